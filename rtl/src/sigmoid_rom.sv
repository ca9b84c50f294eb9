// SPDX-License-Identifier: Apache-2.0
// 2^16 sigmoid(z / 2^14) for 0 <= z < 2^18, for two lanes: intervals of 1/32 from a block RAM, linear between their ends.
// Two registers, moved by enable_i: the RAM's output, and the sum.
//
// An interval rises by at most 2^16 / 4 / 32 = 512, so ten bits hold it and nineteen its product with nine bits.
`default_nettype none

module sigmoid_rom (
    input  wire logic        clk_i,
    input  wire logic        enable_i,
    input  wire logic [17:0] z0_i,
    input  wire logic [17:0] z1_i,
    output logic      [16:0] sigma0_o,
    output logic      [16:0] sigma1_o
);

  (* rom_style = "block" *)
  logic [26:0] rom[512];  // rise, value at the interval's start
  initial begin
    for (int i = 0; i < 512; i++) begin
      rom[i] = {
        10'(contract_pkg::sigmoid_entry(10'(i + 1)) - contract_pkg::sigmoid_entry(10'(i))),
        contract_pkg::sigmoid_entry(10'(i))
      };
    end
  end

  logic [26:0] entry0_q, entry1_q;
  logic [8:0] rest0_q, rest1_q;

  function automatic logic [16:0] between(input logic [26:0] entry, input logic [8:0] rest);
    logic [18:0] rise;
    rise    = entry[26:17] * rest;
    between = entry[16:0] + 17'(rise[18:9]);
  endfunction

  always_ff @(posedge clk_i) begin
    if (enable_i) begin
      entry0_q <= rom[z0_i[17:9]];
      entry1_q <= rom[z1_i[17:9]];
      rest0_q  <= z0_i[8:0];
      rest1_q  <= z1_i[8:0];
      sigma0_o <= between(entry0_q, rest0_q);
      sigma1_o <= between(entry1_q, rest1_q);
    end
  end

endmodule

`default_nettype wire
