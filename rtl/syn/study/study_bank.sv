// SPDX-License-Identifier: Apache-2.0
// One bank of the weight buffer alone: two ports, one of them writes, both registered twice.
`default_nettype none

module study_bank #(
    parameter int unsigned Width = 144,
    parameter int unsigned Words = 4096,
    localparam int unsigned WordBits = $clog2(Words)
) (
    input  wire logic                clk_i,
    input  wire logic                write_i,
    input  wire logic [WordBits-1:0] low_word_i,
    input  wire logic [WordBits-1:0] high_word_i,
    input  wire logic [   Width-1:0] data_i,
    output logic      [   Width-1:0] low_o,
    output logic      [   Width-1:0] high_o
);

  (* ram_style = "ultra" *)
  logic [Width-1:0] store[Words];
  logic [Width-1:0] low_q, high_q;

  always_ff @(posedge clk_i) begin
    if (write_i) store[low_word_i] <= data_i;
    else low_q <= store[low_word_i];
    high_q <= store[high_word_i];
    low_o  <= low_q;
    high_o <= high_q;
  end

endmodule

`default_nettype wire
