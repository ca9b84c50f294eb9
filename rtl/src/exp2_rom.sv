// SPDX-License-Identifier: Apache-2.0
// 2^15 2^(f / 2^14) for 0 <= f < 2^14: intervals of 1/128 from a ROM, linear between their ends. Two registers.
//
// An interval rises by at most 2^15 (2 - 2^(127/128)) < 354: nine bits, sixteen with the seven of the rest.
`default_nettype none

module exp2_rom (
    input  wire logic        clk_i,
    input  wire logic [13:0] f_i,
    output logic      [15:0] value_o
);

  (* rom_style = "distributed" *)
  logic [24:0] rom[128];  // rise, value at the interval's start
  initial begin
    for (int i = 0; i < 128; i++) begin
      rom[i] = {
        9'(contract_pkg::exp2_entry(8'(i + 1)) - contract_pkg::exp2_entry(8'(i))), 16'(contract_pkg::exp2_entry(8'(i)))
      };
    end
  end

  logic [24:0] entry_q;
  logic [6:0] rest_q;
  logic [15:0] rise;
  assign rise = entry_q[24:16] * rest_q;

  always_ff @(posedge clk_i) begin
    entry_q <= rom[f_i[13:7]];
    rest_q  <= f_i[6:0];
    value_o <= entry_q[15:0] + 16'(rise[15:7]);
  end

endmodule

`default_nettype wire
