// SPDX-License-Identifier: Apache-2.0
// The accelerator: runs a decoder layer by descriptors in memory. Registers behind AXI4-Lite; weights come over three read
// ports, keys and values over one each, descriptors, rows and angles over x, which also writes rows and the cache.
//
// A run carries out descriptors from PROGRAM on (sequencer), each LINEAR and ATTEND by its path. All units are reset when a run
// begins, when nothing is under way. A reset in a run forgets what is: the memory's ports must be reset with it.
`default_nettype none

module accelerator
  import run_pkg::*;
#(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    parameter int unsigned Q = 16,
    parameter int unsigned P = 4,
    parameter int unsigned Lanes = 8,  // values a cycle of rows; ports have 16 bits for each
    parameter int unsigned Banks = 2,  // sets of tables; with two the next block's are filled beside the look-up
    parameter int unsigned WeightWords = 12288,
    parameter int unsigned RowBeatsMax = 512,  // of Lanes values
    parameter int unsigned BlocksMax = 49,  // of T * G inputs
    parameter int unsigned BeatsMax = 256,  // of Q outputs
    parameter int unsigned RowsMax = 16,  // of a prompt's chunk
    parameter int unsigned HeadsMax = 16,
    parameter int unsigned KvHeadsMax = 16,
    parameter int unsigned HeadBeatsMax = 32,  // of Lanes values
    parameter int unsigned AttentionBeatsMax = 256,  // of a row of queries
    localparam int unsigned DataBits = 16 * Lanes
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic [        11:0] s_axil_awaddr,
    input  wire logic                s_axil_awvalid,
    output logic                     s_axil_awready,
    input  wire logic [        31:0] s_axil_wdata,
    input  wire logic [         3:0] s_axil_wstrb,
    input  wire logic                s_axil_wvalid,
    output logic                     s_axil_wready,
    output logic      [         1:0] s_axil_bresp,
    output logic                     s_axil_bvalid,
    input  wire logic                s_axil_bready,
    input  wire logic [        11:0] s_axil_araddr,
    input  wire logic                s_axil_arvalid,
    output logic                     s_axil_arready,
    output logic      [        31:0] s_axil_rdata,
    output logic      [         1:0] s_axil_rresp,
    output logic                     s_axil_rvalid,
    input  wire logic                s_axil_rready,
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
    output logic                     m_axi_w2_rready,
    output logic      [AddrBits-1:0] m_axi_k_araddr,
    output logic      [         7:0] m_axi_k_arlen,
    output logic      [         2:0] m_axi_k_arsize,
    output logic      [         1:0] m_axi_k_arburst,
    output logic                     m_axi_k_arvalid,
    input  wire logic                m_axi_k_arready,
    input  wire logic [DataBits-1:0] m_axi_k_rdata,
    input  wire logic [         1:0] m_axi_k_rresp,
    input  wire logic                m_axi_k_rlast,
    input  wire logic                m_axi_k_rvalid,
    output logic                     m_axi_k_rready,
    output logic      [AddrBits-1:0] m_axi_v_araddr,
    output logic      [         7:0] m_axi_v_arlen,
    output logic      [         2:0] m_axi_v_arsize,
    output logic      [         1:0] m_axi_v_arburst,
    output logic                     m_axi_v_arvalid,
    input  wire logic                m_axi_v_arready,
    input  wire logic [DataBits-1:0] m_axi_v_rdata,
    input  wire logic [         1:0] m_axi_v_rresp,
    input  wire logic                m_axi_v_rlast,
    input  wire logic                m_axi_v_rvalid,
    output logic                     m_axi_v_rready,
    output logic      [AddrBits-1:0] m_axi_x_araddr,
    output logic      [         7:0] m_axi_x_arlen,
    output logic      [         2:0] m_axi_x_arsize,
    output logic      [         1:0] m_axi_x_arburst,
    output logic                     m_axi_x_arvalid,
    input  wire logic                m_axi_x_arready,
    input  wire logic [DataBits-1:0] m_axi_x_rdata,
    input  wire logic [         1:0] m_axi_x_rresp,
    input  wire logic                m_axi_x_rlast,
    input  wire logic                m_axi_x_rvalid,
    output logic                     m_axi_x_rready,
    output logic      [AddrBits-1:0] m_axi_x_awaddr,
    output logic      [         7:0] m_axi_x_awlen,
    output logic      [         2:0] m_axi_x_awsize,
    output logic      [         1:0] m_axi_x_awburst,
    output logic                     m_axi_x_awvalid,
    input  wire logic                m_axi_x_awready,
    output logic      [DataBits-1:0] m_axi_x_wdata,
    output logic      [2*Lanes-1:0]  m_axi_x_wstrb,
    output logic                     m_axi_x_wlast,
    output logic                     m_axi_x_wvalid,
    input  wire logic                m_axi_x_wready,
    input  wire logic [         1:0] m_axi_x_bresp,
    input  wire logic                m_axi_x_bvalid,
    output logic                     m_axi_x_bready,
    output logic                     irq_o
);

  localparam int unsigned DescriptorBeats = 512 / DataBits;

  if (Lanes != 4 && Lanes != 8 && Lanes != 16) begin : gen_illegal_lanes
    $error("accelerator: Lanes %0d; 4, 8 or 16 are needed, ports of 64, 128 or 256 bits", Lanes);
  end
  if (RowsMax < 2) begin : gen_illegal_rows
    $error("accelerator: RowsMax %0d; at least 2 are needed", RowsMax);
  end

  // --- registers
  logic unit_reset, start, finished, reset;
  logic [9:0] status;
  logic [3:0] phase, count;
  address_t program_base, weights_base, angles_base;
  logic [31:0] tokens, first, capacity;
  logic [8*AddrBits-1:0] bases;
  logic unused_busy;

  assign reset = rst_i || unit_reset;

  axi_lite_registers #(
      .G(G),
      .T(T),
      .Q(Q),
      .P(P),
      .Lanes(Lanes),
      .RowsMax(RowsMax),
      .AddrBits(AddrBits)
  ) u_registers (
      .clk_i,
      .rst_i,
      .s_axil_awaddr,
      .s_axil_awvalid,
      .s_axil_awready,
      .s_axil_wdata,
      .s_axil_wstrb,
      .s_axil_wvalid,
      .s_axil_wready,
      .s_axil_bresp,
      .s_axil_bvalid,
      .s_axil_bready,
      .s_axil_araddr,
      .s_axil_arvalid,
      .s_axil_arready,
      .s_axil_rdata,
      .s_axil_rresp,
      .s_axil_rvalid,
      .s_axil_rready,
      .unit_reset_o(unit_reset),
      .start_o     (start),
      .done_i      (finished),
      .busy_o      (unused_busy),
      .done_o      (irq_o),
      .status_i    (status),
      .phase_i     (phase),
      .event_i     (count),
      .program_o   (program_base),
      .tokens_o    (tokens),
      .first_o     (first),
      .capacity_o  (capacity),
      .base_o      (bases),
      .weights_o   (weights_base),
      .angles_o    (angles_base)
  );

  // --- the run: who is on, and what all of it has met
  run_t run;
  logic linear_start, linear_on, linear_busy, linear_bad, attend_start, attend_on, attend_busy, bad_descriptor;
  logic row_error, matrix_error, cache_error, writer_short, writer_long;
  logic [6:0] linear_status;
  logic [2:0] attend_status;
  wire logic bus_error = row_error || matrix_error || cache_error;

  // --- rows over x: descriptors, a linear's source or an attention's queries; what is beside the sums; results
  logic fetch_valid, fetch_beat_ready, source_cmd_valid, source_cmd_ready, source_valid, source_ready, source_last;
  logic linear_source_cmd, linear_source_ready, q_cmd, q_ready;
  logic side_cmd_valid, side_cmd_ready, side_valid, side_ready;
  logic target_cmd_valid, target_cmd_ready, target_valid, target_ready, target_last, target_idle;
  logic linear_target_cmd, linear_target_valid, linear_target_last;
  logic attend_target_cmd, attend_target_valid, attend_target_last;
  address_t fetch_addr, linear_source_addr, q_addr, source_addr, side_addr, linear_target_addr, attend_target_addr;
  logic [15:0] source_beats;
  logic [DataBits-1:0] source_data, side_data, linear_target, attend_target;

  always_comb begin
    source_cmd_valid = fetch_valid;
    source_addr      = fetch_addr;
    source_beats     = 16'(DescriptorBeats);
    source_ready     = fetch_beat_ready;
    if (linear_on) begin
      source_cmd_valid = linear_source_cmd;
      source_addr      = linear_source_addr;
      source_beats     = run.in_beats;
      source_ready     = linear_source_ready;
    end
    if (attend_on) begin
      source_cmd_valid = q_cmd;
      source_addr      = q_addr;
      source_beats     = run.out_beats;
      source_ready     = q_ready;
    end
  end

  assign target_cmd_valid = attend_on ? attend_target_cmd : linear_target_cmd;
  assign target_valid     = attend_on ? attend_target_valid : linear_target_valid;
  assign target_last      = attend_on ? attend_target_last : linear_target_last;

  row_port #(
      .Lanes   (Lanes),
      .AddrBits(AddrBits),
      .LenBits (16)
  ) u_rows (
      .clk_i,
      .rst_i             (reset),
      .source_cmd_valid_i(source_cmd_valid),
      .source_cmd_ready_o(source_cmd_ready),
      .source_cmd_addr_i (source_addr),
      .source_cmd_beats_i(source_beats),
      .source_valid_o    (source_valid),
      .source_ready_i    (source_ready),
      .source_data_o     (source_data),
      .source_last_o     (source_last),
      .side_cmd_valid_i  (side_cmd_valid),
      .side_cmd_ready_o  (side_cmd_ready),
      .side_cmd_addr_i   (side_addr),
      .side_cmd_beats_i  (run.side_beats),
      .side_valid_o      (side_valid),
      .side_ready_i      (side_ready),
      .side_data_o       (side_data),
      .target_cmd_valid_i(target_cmd_valid),
      .target_cmd_ready_o(target_cmd_ready),
      .target_cmd_addr_i (attend_on ? attend_target_addr : linear_target_addr),
      .target_cmd_beats_i(run.out_beats),
      .target_valid_i    (target_valid),
      .target_ready_o    (target_ready),
      .target_data_i     (attend_on ? attend_target : linear_target),
      .target_last_i     (target_last),
      .target_idle_o     (target_idle),
      .short_frame_o     (writer_short),
      .long_frame_o      (writer_long),
      .bus_error_o       (row_error),
      .m_axi_x_araddr,
      .m_axi_x_arlen,
      .m_axi_x_arsize,
      .m_axi_x_arburst,
      .m_axi_x_arvalid,
      .m_axi_x_arready,
      .m_axi_x_rdata,
      .m_axi_x_rresp,
      .m_axi_x_rlast,
      .m_axi_x_rvalid,
      .m_axi_x_rready,
      .m_axi_x_awaddr,
      .m_axi_x_awlen,
      .m_axi_x_awsize,
      .m_axi_x_awburst,
      .m_axi_x_awvalid,
      .m_axi_x_awready,
      .m_axi_x_wdata,
      .m_axi_x_wstrb,
      .m_axi_x_wlast,
      .m_axi_x_wvalid,
      .m_axi_x_wready,
      .m_axi_x_bresp,
      .m_axi_x_bvalid,
      .m_axi_x_bready
  );

  // --- what is carried out
  sequencer #(
      .G(G),
      .T(T),
      .Q(Q),
      .Lanes(Lanes),
      .WeightWords(WeightWords),
      .RowBeatsMax(RowBeatsMax),
      .BlocksMax(BlocksMax),
      .BeatsMax(BeatsMax),
      .RowsMax(RowsMax),
      .HeadsMax(HeadsMax),
      .KvHeadsMax(KvHeadsMax),
      .HeadBeatsMax(HeadBeatsMax),
      .AttentionBeatsMax(AttentionBeatsMax)
  ) u_sequencer (
      .clk_i,
      .rst_i         (reset),
      .start_i       (start),
      .finished_o    (finished),
      .bad_o         (bad_descriptor),
      .descriptor_o  (count[3]),
      .bus_error_i   (bus_error),
      .program_i     (program_base),
      .tokens_i      (tokens),
      .first_i       (first),
      .capacity_i    (capacity),
      .base_i        (bases),
      .weights_i     (weights_base),
      .angles_i      (angles_base),
      .fetch_valid_o (fetch_valid),
      .fetch_ready_i (source_cmd_ready),
      .fetch_addr_o  (fetch_addr),
      .in_valid_i    (source_valid),
      .in_ready_o    (fetch_beat_ready),
      .in_data_i     (source_data),
      .run_o         (run),
      .linear_start_o(linear_start),
      .linear_o      (linear_on),
      .linear_busy_i (linear_busy),
      .linear_bad_i  (linear_bad),
      .attend_start_o(attend_start),
      .attend_o      (attend_on),
      .attend_busy_i (attend_busy)
  );

  linear_path #(
      .G(G),
      .T(T),
      .Q(Q),
      .Lanes(Lanes),
      .Banks(Banks),
      .WeightWords(WeightWords),
      .RowBeatsMax(RowBeatsMax),
      .BlocksMax(BlocksMax),
      .BeatsMax(BeatsMax),
      .RowsMax(RowsMax),
      .HeadBeatsMax(HeadBeatsMax)
  ) u_linear (
      .clk_i,
      .rst_i             (reset),
      .start_i           (linear_start),
      .run_i             (run),
      .busy_o            (linear_busy),
      .bad_o             (linear_bad),
      .phase_o           (phase[2:0]),
      .weight_beat_o     (count[0]),
      .source_cmd_valid_o(linear_source_cmd),
      .source_cmd_ready_i(source_cmd_ready && linear_on),
      .source_cmd_addr_o (linear_source_addr),
      .source_valid_i    (source_valid && linear_on),
      .source_ready_o    (linear_source_ready),
      .source_data_i     (source_data),
      .source_last_i     (source_last),
      .side_cmd_valid_o  (side_cmd_valid),
      .side_cmd_ready_i  (side_cmd_ready),
      .side_cmd_addr_o   (side_addr),
      .side_valid_i      (side_valid),
      .side_ready_o      (side_ready),
      .side_data_i       (side_data),
      .target_cmd_valid_o(linear_target_cmd),
      .target_cmd_ready_i(target_cmd_ready && !attend_on),
      .target_cmd_addr_o (linear_target_addr),
      .target_valid_o    (linear_target_valid),
      .target_ready_i    (target_ready && !attend_on),
      .target_data_o     (linear_target),
      .target_last_o     (linear_target_last),
      .target_idle_i     (target_idle),
      .status_o          (linear_status),
      .bus_error_o       (matrix_error),
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

  attend_path #(
      .P(P),
      .Lanes(Lanes),
      .HeadsMax(HeadsMax),
      .KvHeadsMax(KvHeadsMax),
      .BeatsMax(AttentionBeatsMax)
  ) u_attend (
      .clk_i,
      .rst_i             (reset),
      .start_i           (attend_start),
      .run_i             (run),
      .busy_o            (attend_busy),
      .key_row_o         (count[1]),
      .value_row_o       (count[2]),
      .keys_i            (bases[6*AddrBits+:AddrBits]),
      .values_i          (bases[7*AddrBits+:AddrBits]),
      .q_cmd_valid_o     (q_cmd),
      .q_cmd_ready_i     (source_cmd_ready && attend_on),
      .q_cmd_addr_o      (q_addr),
      .q_valid_i         (source_valid && attend_on),
      .q_ready_o         (q_ready),
      .q_data_i          (source_data),
      .target_cmd_valid_o(attend_target_cmd),
      .target_cmd_ready_i(target_cmd_ready && attend_on),
      .target_cmd_addr_o (attend_target_addr),
      .target_valid_o    (attend_target_valid),
      .target_ready_i    (target_ready && attend_on),
      .target_data_o     (attend_target),
      .target_last_o     (attend_target_last),
      .target_idle_i     (target_idle),
      .status_o          (attend_status),
      .bus_error_o       (cache_error),
      .m_axi_k_araddr,
      .m_axi_k_arlen,
      .m_axi_k_arsize,
      .m_axi_k_arburst,
      .m_axi_k_arvalid,
      .m_axi_k_arready,
      .m_axi_k_rdata,
      .m_axi_k_rresp,
      .m_axi_k_rlast,
      .m_axi_k_rvalid,
      .m_axi_k_rready,
      .m_axi_v_araddr,
      .m_axi_v_arlen,
      .m_axi_v_arsize,
      .m_axi_v_arburst,
      .m_axi_v_arvalid,
      .m_axi_v_arready,
      .m_axi_v_rdata,
      .m_axi_v_rresp,
      .m_axi_v_rlast,
      .m_axi_v_rvalid,
      .m_axi_v_rready
  );

  // --- status
  assign phase[3] = attend_on;

  always_comb begin
    status = '0;
    status[contract_pkg::StatusNonfinite]     = linear_status[0] || attend_status[0];
    status[contract_pkg::StatusSaturated]     = linear_status[1] || attend_status[1];
    status[contract_pkg::StatusBadIndex]      = linear_status[2];
    status[contract_pkg::StatusQuantClamp]    = linear_status[3];
    status[contract_pkg::StatusAccClamp]      = linear_status[4];
    status[contract_pkg::StatusScoreClamp]    = attend_status[2];
    status[contract_pkg::StatusShortFrame]    = linear_status[5] || writer_short;
    status[contract_pkg::StatusLongFrame]     = linear_status[6] || writer_long;
    status[contract_pkg::StatusBusError]      = bus_error;
    status[contract_pkg::StatusBadDescriptor] = bad_descriptor;
  end

endmodule

`default_nettype wire
