// SPDX-License-Identifier: Apache-2.0
// A LINEAR: loads a matrix; with `enter` takes every row of the source through norm and quantization into the activation
// store; multiplies each row that is there, dequantizes, fuses and sends it out. Rows are entered while others are multiplied.
//
// A matrix whose stream is shorter or longer than its shape says ends in bad_o, one whose reading failed in bus_error_o: no row
// is multiplied, and the run must be given up. Rows come and go by commands to the readers and the writer.
`default_nettype none

module linear_path
  import run_pkg::*;
#(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    parameter int unsigned Q = 16,
    parameter int unsigned Lanes = 16,
    parameter int unsigned Banks = 1,
    parameter int unsigned WeightWords = 12288,
    parameter int unsigned RowBeatsMax = 256,
    parameter int unsigned BlocksMax = 49,
    parameter int unsigned BeatsMax = 256,
    parameter int unsigned RowsMax = 16,
    parameter int unsigned HeadBeatsMax = 16,
    localparam int unsigned DataBits = 16 * Lanes
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                start_i,
    input  wire run_t                run_i,  // steady from start_i until busy_o falls
    output logic                     busy_o,
    output logic                     bad_o,  // sticky
    output logic      [         2:0] phase_o,  // load, enter, sweep
    output logic                     weight_beat_o,
    // rows
    output logic                     source_cmd_valid_o,
    input  wire logic                source_cmd_ready_i,
    output address_t                 source_cmd_addr_o,
    input  wire logic                source_valid_i,
    output logic                     source_ready_o,
    input  wire logic [DataBits-1:0] source_data_i,
    input  wire logic                source_last_i,
    output logic                     side_cmd_valid_o,
    input  wire logic                side_cmd_ready_i,
    output address_t                 side_cmd_addr_o,
    input  wire logic                side_valid_i,
    output logic                     side_ready_o,
    input  wire logic [DataBits-1:0] side_data_i,
    output logic                     target_cmd_valid_o,
    input  wire logic                target_cmd_ready_i,
    output address_t                 target_cmd_addr_o,
    output logic                     target_valid_o,
    input  wire logic                target_ready_i,
    output logic      [DataBits-1:0] target_data_o,
    output logic                     target_last_o,
    input  wire logic                target_idle_i,
    // sticky: NONFINITE, SATURATED, BAD_INDEX, QUANT_CLAMP, ACC_CLAMP, short frame, long frame
    output logic      [         6:0] status_o,
    output logic                     bus_error_o,  // sticky: of the matrix
    output logic      [AddrBits-1:0] m_axi_w0_araddr,
    output logic      [         7:0] m_axi_w0_arlen,
    output logic      [         2:0] m_axi_w0_arsize,
    output logic      [         1:0] m_axi_w0_arburst,
    output logic                     m_axi_w0_arvalid,
    input  wire logic                m_axi_w0_arready,
    input  wire logic [DataBits-1:0] m_axi_w0_rdata,
    input  wire logic [         1:0] m_axi_w0_rresp,
    input  wire logic                m_axi_w0_rlast,
    input  wire logic                m_axi_w0_rvalid,
    output logic                     m_axi_w0_rready,
    output logic      [AddrBits-1:0] m_axi_w1_araddr,
    output logic      [         7:0] m_axi_w1_arlen,
    output logic      [         2:0] m_axi_w1_arsize,
    output logic      [         1:0] m_axi_w1_arburst,
    output logic                     m_axi_w1_arvalid,
    input  wire logic                m_axi_w1_arready,
    input  wire logic [DataBits-1:0] m_axi_w1_rdata,
    input  wire logic [         1:0] m_axi_w1_rresp,
    input  wire logic                m_axi_w1_rlast,
    input  wire logic                m_axi_w1_rvalid,
    output logic                     m_axi_w1_rready,
    output logic      [AddrBits-1:0] m_axi_w2_araddr,
    output logic      [         7:0] m_axi_w2_arlen,
    output logic      [         2:0] m_axi_w2_arsize,
    output logic      [         1:0] m_axi_w2_arburst,
    output logic                     m_axi_w2_arvalid,
    input  wire logic                m_axi_w2_arready,
    input  wire logic [DataBits-1:0] m_axi_w2_rdata,
    input  wire logic [         1:0] m_axi_w2_rresp,
    input  wire logic                m_axi_w2_rlast,
    input  wire logic                m_axi_w2_rvalid,
    output logic                     m_axi_w2_rready
);

  localparam int unsigned IndexBits = $clog2(3 ** G);
  localparam int unsigned VectorBits = T * IndexBits;
  localparam int unsigned PerBeat = (768 - 16) / VectorBits;
  localparam int unsigned Vectors = PerBeat < Q / 2 ? PerBeat : Q / 2;
  localparam int unsigned LoadBits = $clog2(WeightWords * (Q / 2) + 1);
  localparam int unsigned ReadBits = $clog2(WeightWords / 2 + 1);
  localparam int unsigned RowBits = RowsMax > 1 ? $clog2(RowsMax) : 1;
  localparam int unsigned BlocksBits = $clog2(BlocksMax + 1);
  localparam int unsigned SweepBits = $clog2(BeatsMax + 1);
  localparam int unsigned QBits = $clog2(Q + 1);

  typedef enum logic [1:0] {
    Idle,
    Load,
    Rows
  } state_e;

  state_e state_q;
  logic [15:0] entered_q, left_q;
  logic rows_start_q, finished;

  assign busy_o  = state_q != Idle;
  assign phase_o = {state_q == Rows && entered_q != '0, state_q == Rows && entered_q != run_i.rows, state_q == Load};

  // --- load
  logic load_done, load_failed, load_valid, load_ready, vec_valid, vec_ready, norm_valid, bad_index;
  logic [15:0] norm_data;
  logic [Vectors*VectorBits-1:0] vec_data;

  matrix_loader #(
      .G(G),
      .T(T),
      .Q(Q),
      .Lanes(Lanes)
  ) u_loader (
      .clk_i,
      .rst_i,
      .active_i    (state_q == Load),
      .run_i,
      .done_o      (load_done),
      .failed_o    (load_failed),
      .bad_o,
      .beat_o      (weight_beat_o),
      .load_valid_o(load_valid),
      .load_ready_i(load_ready),
      .vec_valid_o (vec_valid),
      .vec_ready_i (vec_ready),
      .vec_data_o  (vec_data),
      .norm_valid_o(norm_valid),
      .norm_data_o (norm_data),
      .bad_index_o (bad_index),
      .bus_error_o,
      .m_axi_w0_araddr,
      .m_axi_w0_arlen,
      .m_axi_w0_arsize,
      .m_axi_w0_arburst,
      .m_axi_w0_arvalid,
      .m_axi_w0_arready,
      .m_axi_w0_rdata,
      .m_axi_w0_rresp,
      .m_axi_w0_rlast,
      .m_axi_w0_rvalid,
      .m_axi_w0_rready,
      .m_axi_w1_araddr,
      .m_axi_w1_arlen,
      .m_axi_w1_arsize,
      .m_axi_w1_arburst,
      .m_axi_w1_arvalid,
      .m_axi_w1_arready,
      .m_axi_w1_rdata,
      .m_axi_w1_rresp,
      .m_axi_w1_rlast,
      .m_axi_w1_rvalid,
      .m_axi_w1_rready,
      .m_axi_w2_araddr,
      .m_axi_w2_arlen,
      .m_axi_w2_arsize,
      .m_axi_w2_arburst,
      .m_axi_w2_arvalid,
      .m_axi_w2_arready,
      .m_axi_w2_rdata,
      .m_axi_w2_rresp,
      .m_axi_w2_rlast,
      .m_axi_w2_rvalid,
      .m_axi_w2_rready
  );

  // --- rows: counts of what has been asked of each unit; a row may be multiplied when it has been entered
  localparam int unsigned Units = 4;  // product, weights, activations, fuse
  logic [Units-1:0] unit_valid, unit_ready, unit_take;
  logic [15:0] asked[Units];

  for (genvar unit = 0; unit < Units; unit++) begin : gen_unit
    logic [15:0] asked_q2;
    assign unit_valid[unit] = state_q == Rows && !rows_start_q && asked_q2 < entered_q;
    assign unit_take[unit]  = unit_valid[unit] && unit_ready[unit];
    always_ff @(posedge clk_i) begin
      if (state_q != Rows) asked_q2 <= '0;
      else if (unit_take[unit]) asked_q2 <= asked_q2 + 16'd1;
    end
    assign asked[unit] = asked_q2;
  end

  // --- entry
  logic entry_cmd_valid, entry_cmd_ready, block_valid, block_last, entry_nonfinite, entry_saturated, quant_clamp;
  logic entry_short, entry_long, source_done;
  logic [15:0] entry_left_q;
  logic [T*G*8-1:0] block_data;
  logic [14:0] entry_scale;

  row_commands u_source (
      .clk_i,
      .rst_i,
      .start_i    (rows_start_q),
      .base_i     (run_i.source),
      .stride_i   (address_t'(run_i.in_beats) * address_t'(2 * Lanes)),
      .rows_i     (run_i.enter ? run_i.rows : '0),
      .gate_i     ('1),
      .done_o     (source_done),
      .cmd_valid_o(source_cmd_valid_o),
      .cmd_ready_i(source_cmd_ready_i),
      .cmd_addr_o (source_cmd_addr_o)
  );

  assign entry_cmd_valid = entry_left_q != '0;

  always_ff @(posedge clk_i) begin
    if (rst_i) entry_left_q <= '0;
    else if (rows_start_q) entry_left_q <= run_i.enter ? run_i.rows : '0;
    else if (entry_cmd_valid && entry_cmd_ready) entry_left_q <= entry_left_q - 16'd1;

    if (state_q != Rows) entered_q <= run_i.enter ? '0 : run_i.rows;
    else if (block_valid && block_last) entered_q <= entered_q + 16'd1;
  end

  row_entry #(
      .Lanes(Lanes),
      .G(G),
      .T(T),
      .RowBeatsMax(RowBeatsMax)
  ) u_entry (
      .clk_i,
      .rst_i,
      .cmd_valid_i  (entry_cmd_valid),
      .cmd_ready_o  (entry_cmd_ready),
      .cmd_norm_i   (run_i.norm),
      .cmd_beats_i  (run_i.in_beats),
      .cmd_width_i  (run_i.inputs),
      .cmd_eps_i    (run_i.eps),
      .w_start_i    (state_q == Idle),
      .w_valid_i    (norm_valid),
      .w_data_i     (norm_data),
      .in_valid_i   (source_valid_i),
      .in_ready_o   (source_ready_o),
      .in_data_i    (source_data_i),
      .in_last_i    (source_last_i),
      .block_valid_o(block_valid),
      .block_ready_i(1'b1),
      .block_data_o (block_data),
      .block_last_o (block_last),
      .scale_o      (entry_scale),
      .nonfinite_o  (entry_nonfinite),
      .saturated_o  (entry_saturated),
      .quant_clamp_o(quant_clamp),
      .short_frame_o(entry_short),
      .long_frame_o (entry_long)
  );

  logic act_valid, act_ready;
  logic [T*G*8-1:0] act_data;
  logic [14:0] row_scale;

  activation_store #(
      .BlockBits(T * G * 8),
      .BlocksMax(BlocksMax),
      .RowsMax(RowsMax)
  ) u_activations (
      .clk_i,
      .rst_i,
      .write_i      (block_valid),
      .write_row_i  (RowBits'(entered_q)),
      .write_last_i (block_last),
      .write_block_i(block_data),
      .write_scale_i(entry_scale),
      .read_valid_i (unit_valid[2]),
      .read_ready_o (unit_ready[2]),
      .read_row_i   (RowBits'(asked[2])),
      .read_blocks_i(BlocksBits'(run_i.blocks)),
      .out_valid_o  (act_valid),
      .out_ready_i  (act_ready),
      .out_data_o   (act_data),
      .scale_row_i  (RowBits'(asked[3])),
      .scale_o      (row_scale)
  );

  // --- weights and the product
  logic w_valid, w_ready;
  logic [Q*VectorBits-1:0] w_data;

  weight_buffer #(
      .VectorBits(VectorBits),
      .Q(Q),
      .Vectors(Vectors),
      .Words(WeightWords)
  ) u_weights (
      .clk_i,
      .rst_i,
      .load_valid_i  (load_valid),
      .load_ready_o  (load_ready),
      .load_vectors_i(LoadBits'(run_i.vectors)),
      .mem_valid_i   (vec_valid),
      .mem_ready_o   (vec_ready),
      .mem_data_i    (vec_data),
      .read_valid_i  (unit_valid[1]),
      .read_ready_o  (unit_ready[1]),
      .read_beats_i  (ReadBits'(run_i.blocks * run_i.sweep_beats)),
      .w_valid_o     (w_valid),
      .w_ready_i     (w_ready),
      .w_data_o      (w_data)
  );

  logic sum_valid, sum_ready, sum_last, unused_busy;
  logic [Q*32-1:0] sum_data;
  logic [Q-1:0] unused_keep;

  tlmm_core #(
      .G(G),
      .T(T),
      .Q(Q),
      .BeatsMax(BeatsMax),
      .BlocksMax(BlocksMax),
      .Banks(Banks)
  ) u_product (
      .clk_i,
      .rst_i,
      .cmd_valid_i (unit_valid[0]),
      .cmd_ready_o (unit_ready[0]),
      .cmd_beats_i (SweepBits'(run_i.sweep_beats)),
      .cmd_tail_i  (QBits'(run_i.sweep_tail)),
      .cmd_blocks_i(BlocksBits'(run_i.blocks)),
      .act_valid_i (act_valid),
      .act_ready_o (act_ready),
      .act_data_i  (act_data),
      .w_valid_i   (w_valid),
      .w_ready_o   (w_ready),
      .w_data_i    (w_data),
      .out_valid_o (sum_valid),
      .out_ready_i (sum_ready),
      .out_data_o  (sum_data),
      .out_keep_o  (unused_keep),
      .out_last_o  (sum_last),
      .busy_o      (unused_busy)
  );

  logic acc_valid, acc_ready, acc_last;
  logic [Lanes*32-1:0] acc_data;

  gearbox #(
      .Width(32),
      .In(Q),
      .Out(Lanes)
  ) u_sums (
      .clk_i,
      .rst_i,
      .in_valid_i (sum_valid),
      .in_ready_o (sum_ready),
      .in_data_i  (sum_data),
      .in_lanes_i (sum_last ? QBits'(run_i.sweep_tail) : QBits'(Q)),
      .in_last_i  (sum_last),
      .out_valid_o(acc_valid),
      .out_ready_i(acc_ready),
      .out_data_o (acc_data),
      .out_last_o (acc_last)
  );

  // --- fuse
  logic fuse_nonfinite, fuse_saturated, acc_clamp, fuse_short, fuse_long, side_done, target_done;

  row_commands u_side (
      .clk_i,
      .rst_i,
      .start_i    (rows_start_q),
      .base_i     (run_i.side),
      .stride_i   (run_i.side_stride),
      .rows_i     (run_i.mode == fuse_pkg::Bypass ? '0 : run_i.rows),
      .gate_i     (entered_q),
      .done_o     (side_done),
      .cmd_valid_o(side_cmd_valid_o),
      .cmd_ready_i(side_cmd_ready_i),
      .cmd_addr_o (side_cmd_addr_o)
  );

  row_commands u_target (
      .clk_i,
      .rst_i,
      .start_i    (rows_start_q),
      .base_i     (run_i.target),
      .stride_i   (run_i.target_stride),
      .rows_i     (run_i.rows),
      .gate_i     (entered_q),
      .done_o     (target_done),
      .cmd_valid_o(target_cmd_valid_o),
      .cmd_ready_i(target_cmd_ready_i),
      .cmd_addr_o (target_cmd_addr_o)
  );

  dequant_fuse #(
      .Lanes(Lanes),
      .HeadBeatsMax(HeadBeatsMax)
  ) u_fuse (
      .clk_i,
      .rst_i,
      .cmd_valid_i     (unit_valid[3]),
      .cmd_ready_o     (unit_ready[3]),
      .cmd_mode_i      (run_i.mode),
      .cmd_scale_i     (row_scale),
      .cmd_mantissa_i  (run_i.mantissa),
      .cmd_exponent_i  (run_i.exponent),
      .cmd_beats_i     (run_i.out_beats),
      .cmd_head_beats_i(run_i.head_beats),
      .acc_valid_i     (acc_valid),
      .acc_ready_o     (acc_ready),
      .acc_data_i      (acc_data),
      .acc_last_i      (acc_last),
      .side_valid_i,
      .side_ready_o,
      .side_data_i,
      .out_valid_o     (target_valid_o),
      .out_ready_i     (target_ready_i),
      .out_data_o      (target_data_o),
      .out_last_o      (target_last_o),
      .nonfinite_o     (fuse_nonfinite),
      .saturated_o     (fuse_saturated),
      .acc_clamp_o     (acc_clamp),
      .short_frame_o   (fuse_short),
      .long_frame_o    (fuse_long)
  );

  // --- the way
  assign finished = state_q == Rows && !rows_start_q && left_q == '0 && source_done && side_done && target_done && target_idle_i;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      state_q      <= Idle;
      rows_start_q <= 1'b0;
    end else begin
      rows_start_q <= 1'b0;
      case (state_q)
        Idle: if (start_i) state_q <= Load;
        Load: begin
          if (load_done) begin
            state_q      <= load_failed ? Idle : Rows;
            rows_start_q <= !load_failed;
          end
        end
        default: if (finished) state_q <= Idle;
      endcase
    end
    if (state_q != Rows) left_q <= run_i.rows;
    else if (target_valid_o && target_ready_i && target_last_o) left_q <= left_q - 16'd1;
  end

  assign status_o = {
    fuse_long || entry_long,
    fuse_short || entry_short,
    acc_clamp,
    quant_clamp,
    bad_index,
    fuse_saturated || entry_saturated,
    fuse_nonfinite || entry_nonfinite
  };

endmodule

`default_nettype wire
