// SPDX-License-Identifier: Apache-2.0
// A row's way to the table-lookup product: norm or only its maximum, a store of a row until that is known, quantization, and
// blocks of T * G activations, zeros behind the row's end. A scale comes with each row, before its blocks' last.
`default_nettype none

module row_entry #(
    parameter int unsigned Lanes = 16,
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    parameter int unsigned RowBeatsMax = 256,
    localparam int unsigned Block = T * G
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                cmd_valid_i,
    output logic                     cmd_ready_o,
    input  wire logic                cmd_norm_i,
    input  wire logic [        15:0] cmd_beats_i,
    input  wire logic [        14:0] cmd_width_i,
    input  wire logic [        46:0] cmd_eps_i,
    input  wire logic                w_start_i,
    input  wire logic                w_valid_i,
    input  wire logic [        15:0] w_data_i,
    input  wire logic                in_valid_i,
    output logic                     in_ready_o,
    input  wire logic [Lanes*16-1:0] in_data_i,
    input  wire logic                in_last_i,
    output logic                     block_valid_o,
    input  wire logic                block_ready_i,
    output logic      [ Block*8-1:0] block_data_o,
    output logic                     block_last_o,
    output logic      [        14:0] scale_o,       // with block_last_o, of its row
    output logic                     nonfinite_o,
    output logic                     saturated_o,
    output logic                     quant_clamp_o,
    output logic                     short_frame_o,
    output logic                     long_frame_o
);

  localparam int unsigned LaneBits = $clog2(Lanes + 1);

  logic norm_valid, norm_ready, norm_last, max_valid, max_ready, norm_cmd_ready, norm_nonfinite, tails_ready;
  logic [Lanes*16-1:0] norm_data;
  logic [14:0] max;

  // How many lanes of a row's last beat count, kept until it is quantized.
  logic tail_valid, quantized_taken;
  logic [LaneBits-1:0] tail, cmd_tail;
  logic [2:0] unused_tails;
  assign cmd_ready_o = norm_cmd_ready && tails_ready;
  assign cmd_tail    = LaneBits'((32'(cmd_width_i) - 1) % Lanes + 1);

  fifo #(
      .Width(LaneBits),
      .Depth(4)
  ) u_tails (
      .clk_i,
      .rst_i,
      .valid_i(cmd_valid_i && cmd_ready_o),
      .ready_o(tails_ready),
      .data_i (cmd_tail),
      .valid_o(tail_valid),
      .ready_i(quantized_taken),
      .data_o (tail),
      .count_o(unused_tails)
  );

  rms_max #(
      .Lanes(Lanes),
      .RowBeatsMax(RowBeatsMax)
  ) u_norm (
      .clk_i,
      .rst_i,
      .cmd_valid_i(cmd_valid_i && tails_ready),
      .cmd_ready_o(norm_cmd_ready),
      .cmd_norm_i,
      .cmd_beats_i,
      .cmd_width_i,
      .cmd_eps_i,
      .w_start_i,
      .w_valid_i,
      .w_data_i,
      .in_valid_i,
      .in_ready_o,
      .in_data_i,
      .in_last_i,
      .out_valid_o(norm_valid),
      .out_ready_i(norm_ready),
      .out_data_o (norm_data),
      .out_last_o (norm_last),
      .max_valid_o(max_valid),
      .max_ready_i(max_ready),
      .max_data_o (max),
      .nonfinite_o(norm_nonfinite),
      .saturated_o,
      .short_frame_o,
      .long_frame_o
  );

  // --- the row waits for its maximum
  logic row_valid, row_ready, row_last;
  logic [Lanes*16-1:0] row_data;

  block_fifo #(
      .Width(Lanes * 16 + 1),
      .Depth(RowBeatsMax)
  ) u_row (
      .clk_i,
      .rst_i,
      .valid_i(norm_valid),
      .ready_o(norm_ready),
      .data_i ({norm_last, norm_data}),
      .valid_o(row_valid),
      .ready_i(row_ready),
      .data_o ({row_last, row_data})
  );

  logic quantized_valid, quantized_ready, quantized_last, quantize_nonfinite;
  logic [Lanes*8-1:0] quantized;
  logic [14:0] scale, scale_q;

  quantize #(
      .Lanes(Lanes)
  ) u_quantize (
      .clk_i,
      .rst_i,
      .max_valid_i(max_valid),
      .max_ready_o(max_ready),
      .max_data_i (max),
      .in_valid_i (row_valid),
      .in_ready_o (row_ready),
      .in_data_i  (row_data),
      .in_last_i  (row_last),
      .scale_o    (scale),
      .out_valid_o(quantized_valid),
      .out_ready_i(quantized_ready),
      .out_data_o (quantized),
      .out_last_o (quantized_last),
      .clamped_o  (quant_clamp_o),
      .nonfinite_o(quantize_nonfinite)
  );
  assign nonfinite_o = norm_nonfinite || quantize_nonfinite;

  assign quantized_taken = quantized_valid && quantized_ready && quantized_last;
  always_ff @(posedge clk_i) if (quantized_taken) scale_q <= scale;
  assign scale_o = scale_q;

  gearbox #(
      .Width(8),
      .In(Lanes),
      .Out(Block)
  ) u_blocks (
      .clk_i,
      .rst_i,
      .in_valid_i (quantized_valid),
      .in_ready_o (quantized_ready),
      .in_data_i  (quantized),
      .in_lanes_i (quantized_last ? tail : LaneBits'(Lanes)),
      .in_last_i  (quantized_last),
      .out_valid_o(block_valid_o),
      .out_ready_i(block_ready_i),
      .out_data_o (block_data_o),
      .out_last_o (block_last_o)
  );

`ifdef VERILATOR
  always_ff @(posedge clk_i) begin
    if (!rst_i) begin
      assert (!quantized_taken || tail_valid)
      else $error("row_entry: a row without its width");
    end
  end
`else
  wire logic unused_tail_valid = &{1'b0, tail_valid};
`endif

endmodule

`default_nettype wire
