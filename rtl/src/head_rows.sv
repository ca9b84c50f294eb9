// SPDX-License-Identifier: Apache-2.0
// Rows of heads as they come, and the largest exponent of each head, found while it is written. A read gives a beat and its
// head's exponent one cycle later.
`default_nettype none

module head_rows #(
    parameter int unsigned Lanes = 16,
    parameter int unsigned Rows = 4,
    parameter int unsigned HeadsMax = 16,
    parameter int unsigned BeatsMax = 96,  // of a row
    localparam int unsigned RowBits = Rows > 1 ? $clog2(Rows) : 1,
    localparam int unsigned HeadBits = HeadsMax > 1 ? $clog2(HeadsMax) : 1,
    localparam int unsigned BeatBits = BeatsMax > 1 ? $clog2(BeatsMax) : 1
) (
    input  wire logic                clk_i,
    input  wire logic                write_i,
    input  wire logic [ RowBits-1:0] write_row_i,
    input  wire logic [HeadBits-1:0] write_head_i,
    input  wire logic [BeatBits-1:0] write_beat_i,   // of the row
    input  wire logic                write_first_i,  // of its head
    input  wire logic [Lanes*16-1:0] write_data_i,
    input  wire logic [ RowBits-1:0] read_row_i,
    input  wire logic [HeadBits-1:0] read_head_i,
    input  wire logic [BeatBits-1:0] read_beat_i,
    output logic      [Lanes*16-1:0] data_o,
    output logic signed [       5:0] top_o,
    // of what is written, at once: its head's exponent so far, and whether a value is not finite
    output logic signed [       5:0] written_top_o,
    output logic                     nonfinite_o
);

  localparam int unsigned RowsBits = $clog2(Rows);
  localparam int unsigned PlaceBits = RowsBits + BeatBits;
  localparam int unsigned TopBits = RowsBits + HeadBits;

  (* ram_style = "block" *)
  logic [Lanes*16-1:0] beats[1<<PlaceBits];
  (* ram_style = "distributed" *)
  logic [5:0] tops[1<<TopBits];

  logic signed [5:0] beat_top, running_q, top;

  always_comb begin
    beat_top    = write_first_i ? 6'(half_pkg::MinExponent) : running_q;
    nonfinite_o = 1'b0;
    for (int unsigned lane = 0; lane < Lanes; lane++) begin
      if (half_pkg::exponent(half_pkg::finite(write_data_i[lane*16+:15])) > beat_top) begin
        beat_top = half_pkg::exponent(half_pkg::finite(write_data_i[lane*16+:15]));
      end
      nonfinite_o = nonfinite_o || (write_i && half_pkg::nonfinite(write_data_i[lane*16+:15]));
    end
  end

  assign written_top_o = beat_top;
  assign top           = signed'(tops[TopBits'({read_row_i, read_head_i})]);

  always_ff @(posedge clk_i) begin
    if (write_i) begin
      beats[PlaceBits'({write_row_i, write_beat_i})] <= write_data_i;
      tops[TopBits'({write_row_i, write_head_i})] <= beat_top;
      running_q                          <= beat_top;
    end
    data_o <= beats[PlaceBits'({read_row_i, read_beat_i})];
    top_o  <= top;
  end

endmodule

`default_nettype wire
