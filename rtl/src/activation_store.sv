// SPDX-License-Identifier: Apache-2.0
// Quantized rows of a prompt's chunk, block by block, and their scales. One row is written while another is read; a read gives
// a row's blocks in a stream.
`default_nettype none

module activation_store #(
    parameter int unsigned BlockBits = 672,
    parameter int unsigned BlocksMax = 49,  // of a row
    parameter int unsigned RowsMax = 16,
    localparam int unsigned RowBits = RowsMax > 1 ? $clog2(RowsMax) : 1,
    localparam int unsigned CountBits = $clog2(BlocksMax + 1)
) (
    input  wire logic                 clk_i,
    input  wire logic                 rst_i,
    input  wire logic                 write_i,
    input  wire logic [  RowBits-1:0] write_row_i,
    input  wire logic                 write_last_i,  // block of its row
    input  wire logic [BlockBits-1:0] write_block_i,
    input  wire logic [         14:0] write_scale_i, // with the last
    input  wire logic                 read_valid_i,
    output logic                      read_ready_o,
    input  wire logic [  RowBits-1:0] read_row_i,
    input  wire logic [CountBits-1:0] read_blocks_i,
    output logic                      out_valid_o,
    input  wire logic                 out_ready_i,
    output logic      [BlockBits-1:0] out_data_o,
    input  wire logic [  RowBits-1:0] scale_row_i,
    output logic      [         14:0] scale_o
);

  localparam int unsigned PlaceBits = BlocksMax > 1 ? $clog2(BlocksMax) : 1;

  (* ram_style = "ultra" *)
  logic [BlockBits-1:0] blocks[RowsMax<<PlaceBits];
  (* ram_style = "distributed" *)
  logic [14:0] scales[RowsMax];

  logic [PlaceBits-1:0] write_place_q, read_place_q;
  logic [RowBits-1:0] row_q;
  logic [CountBits-1:0] left_q;
  logic advance;

  assign scale_o      = scales[scale_row_i];
  assign read_ready_o = left_q == '0;
  assign advance      = out_ready_i || !out_valid_o;

  always_ff @(posedge clk_i) begin
    if (rst_i) write_place_q <= '0;
    else if (write_i) write_place_q <= write_last_i ? '0 : write_place_q + 1'b1;
    if (write_i) blocks[{write_row_i, write_place_q}] <= write_block_i;
    if (write_i && write_last_i) scales[write_row_i] <= write_scale_i;
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      left_q      <= '0;
      out_valid_o <= 1'b0;
    end else begin
      if (read_valid_i && read_ready_o) left_q <= read_blocks_i;
      else if (advance && left_q != '0) left_q <= left_q - 1'b1;
      if (advance) out_valid_o <= left_q != '0;
    end
  end

  always_ff @(posedge clk_i) begin
    if (read_valid_i && read_ready_o) begin
      row_q        <= read_row_i;
      read_place_q <= '0;
    end else if (advance && left_q != '0) begin
      read_place_q <= read_place_q + 1'b1;
    end
    if (advance) out_data_o <= blocks[{row_q, read_place_q}];
  end

endmodule

`default_nettype wire
