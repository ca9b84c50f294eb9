// SPDX-License-Identifier: Apache-2.0
// The accelerator: runs a decoder layer by descriptors in memory. Registers behind AXI4-Lite; weights come over three read
// ports, keys and values over one each, descriptors, rows and angles over x, which also writes rows and the cache.
//
// A run reads descriptors from PROGRAM on and carries them out one after the other, each when the one before has been
// answered by memory, until one ends it. All units are reset when a run begins; a reset in a run needs the memory's ports to
// be reset with it.
`default_nettype none

module accelerator
  import run_pkg::*;
#(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    parameter int unsigned Q = 16,
    parameter int unsigned P = 4,
    parameter int unsigned Lanes = 16,
    parameter int unsigned Banks = 1,
    parameter int unsigned WeightWords = 12288,
    parameter int unsigned RowBeatsMax = 256,  // of Lanes values
    parameter int unsigned BlocksMax = 49,  // of T * G inputs
    parameter int unsigned BeatsMax = 256,  // of Q outputs
    parameter int unsigned RowsMax = 16,  // of a prompt's chunk
    parameter int unsigned HeadsMax = 16,
    parameter int unsigned KvHeadsMax = 16,
    parameter int unsigned HeadBeatsMax = 16,  // of Lanes values
    parameter int unsigned AttentionBeatsMax = 128,  // of a row of queries
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

  localparam int unsigned DescriptorBytes = 64;
  localparam int unsigned DescriptorBeats = 8 * DescriptorBytes / DataBits;

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

  // --- the run: fetch, carry out, next
  typedef enum logic [2:0] {
    Idle,
    Fetch,
    Decode,
    Begin,
    Linear,
    Attend
  } state_e;

  state_e state_q;
  address_t place_q;
  run_t run;
  logic fetched, is_end, is_bad, linear_busy, linear_bad, attend_busy, bad_q;
  logic source_cmd_ready;

  always_ff @(posedge clk_i) begin
    finished <= 1'b0;
    if (reset) begin
      state_q <= Idle;
      bad_q   <= 1'b0;
    end else begin
      case (state_q)
        Idle:  if (start) state_q <= Fetch;
        Fetch: if (source_cmd_ready) state_q <= Decode;
        Decode: begin
          if (fetched) begin
            state_q  <= is_end || is_bad ? Idle : Begin;
            finished <= is_end || is_bad;
            bad_q    <= is_bad;
          end
        end
        Begin: state_q <= run.attend ? Attend : Linear;
        Linear: begin
          if (!linear_busy) begin
            state_q  <= linear_bad ? Idle : Fetch;
            finished <= linear_bad;
            bad_q    <= linear_bad;
          end
        end
        default: if (!attend_busy) state_q <= Fetch;
      endcase
    end
    if (start) place_q <= program_base;
    else if (state_q == Fetch && source_cmd_ready) place_q <= place_q + address_t'(DescriptorBytes);
  end

  // --- rows over x: descriptors, sources and queries by one reader, sides by another
  logic source_cmd_valid, source_valid, source_ready, source_last, source_error;
  address_t source_cmd_addr;
  logic [23:0] source_cmd_beats;
  logic [DataBits-1:0] source_data;
  logic linear_source_valid, linear_source_ready, q_cmd_valid, q_ready, descriptor_ready;
  address_t linear_source_addr, q_cmd_addr;

  always_comb begin
    source_cmd_valid = 1'b0;
    source_cmd_addr  = place_q;
    source_cmd_beats = 24'(DescriptorBeats);
    source_ready     = 1'b0;
    case (state_q)
      Fetch: source_cmd_valid = 1'b1;
      Decode: source_ready = descriptor_ready;
      Linear: begin
        source_cmd_valid = linear_source_valid;
        source_cmd_addr  = linear_source_addr;
        source_cmd_beats = 24'(run.in_beats);
        source_ready     = linear_source_ready;
      end
      Attend: begin
        source_cmd_valid = q_cmd_valid;
        source_cmd_addr  = q_cmd_addr;
        source_cmd_beats = 24'(run.out_beats);
        source_ready     = q_ready;
      end
      default: ;
    endcase
  end

  logic [2*AddrBits-1:0] x_araddr;
  logic [15:0] x_arlen;
  logic [5:0] x_arsize;
  logic [3:0] x_arburst;
  logic [1:0] x_arvalid, x_arready, x_rvalid, x_rready;

  axi_reader #(
      .DataBits(DataBits),
      .AddrBits(AddrBits)
  ) u_source (
      .clk_i,
      .rst_i        (reset),
      .cmd_valid_i  (source_cmd_valid),
      .cmd_ready_o  (source_cmd_ready),
      .cmd_addr_i   (source_cmd_addr),
      .cmd_beats_i  (source_cmd_beats),
      .out_valid_o  (source_valid),
      .out_ready_i  (source_ready),
      .out_data_o   (source_data),
      .out_last_o   (source_last),
      .bus_error_o  (source_error),
      .m_axi_araddr (x_araddr[0*AddrBits+:AddrBits]),
      .m_axi_arlen  (x_arlen[0*8+:8]),
      .m_axi_arsize (x_arsize[0*3+:3]),
      .m_axi_arburst(x_arburst[0*2+:2]),
      .m_axi_arvalid(x_arvalid[0]),
      .m_axi_arready(x_arready[0]),
      .m_axi_rdata  (m_axi_x_rdata),
      .m_axi_rresp  (m_axi_x_rresp),
      .m_axi_rlast  (m_axi_x_rlast),
      .m_axi_rvalid (x_rvalid[0]),
      .m_axi_rready (x_rready[0])
  );

  logic side_cmd_valid, side_cmd_ready, side_valid, side_ready, unused_side_last, side_error;
  address_t side_cmd_addr;
  logic [DataBits-1:0] side_data;

  axi_reader #(
      .DataBits(DataBits),
      .AddrBits(AddrBits)
  ) u_side (
      .clk_i,
      .rst_i        (reset),
      .cmd_valid_i  (side_cmd_valid),
      .cmd_ready_o  (side_cmd_ready),
      .cmd_addr_i   (side_cmd_addr),
      .cmd_beats_i  (24'(run.side_beats)),
      .out_valid_o  (side_valid),
      .out_ready_i  (side_ready),
      .out_data_o   (side_data),
      .out_last_o   (unused_side_last),
      .bus_error_o  (side_error),
      .m_axi_araddr (x_araddr[1*AddrBits+:AddrBits]),
      .m_axi_arlen  (x_arlen[1*8+:8]),
      .m_axi_arsize (x_arsize[1*3+:3]),
      .m_axi_arburst(x_arburst[1*2+:2]),
      .m_axi_arvalid(x_arvalid[1]),
      .m_axi_arready(x_arready[1]),
      .m_axi_rdata  (m_axi_x_rdata),
      .m_axi_rresp  (m_axi_x_rresp),
      .m_axi_rlast  (m_axi_x_rlast),
      .m_axi_rvalid (x_rvalid[1]),
      .m_axi_rready (x_rready[1])
  );

  axi_read_arbiter #(
      .AddrBits(AddrBits)
  ) u_arbiter (
      .clk_i,
      .rst_i        (reset),
      .s_axi_araddr (x_araddr),
      .s_axi_arlen  (x_arlen),
      .s_axi_arvalid(x_arvalid),
      .s_axi_arready(x_arready),
      .s_axi_rvalid (x_rvalid),
      .s_axi_rready (x_rready),
      .m_axi_araddr (m_axi_x_araddr),
      .m_axi_arlen  (m_axi_x_arlen),
      .m_axi_arvalid(m_axi_x_arvalid),
      .m_axi_arready(m_axi_x_arready),
      .m_axi_rlast  (m_axi_x_rlast),
      .m_axi_rvalid (m_axi_x_rvalid),
      .m_axi_rready (m_axi_x_rready)
  );
  assign m_axi_x_arsize  = x_arsize[2:0];
  assign m_axi_x_arburst = x_arburst[1:0];

  descriptor_unit #(
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
  ) u_descriptor (
      .clk_i,
      .rst_i     (reset),
      .take_i    (state_q == Decode),
      .in_valid_i(source_valid && state_q == Decode),
      .in_ready_o(descriptor_ready),
      .in_data_i (source_data),
      .done_o    (fetched),
      .end_o     (is_end),
      .bad_o     (is_bad),
      .run_o     (run),
      .tokens_i  (tokens),
      .first_i   (first),
      .capacity_i(capacity),
      .base_i    (bases),
      .weights_i (weights_base),
      .angles_i  (angles_base)
  );

  // --- rows written
  logic target_cmd_ready, target_ready, writer_idle, writer_short, writer_long, writer_error;
  logic linear_target_cmd, attend_target_cmd, linear_target_valid, attend_target_valid, linear_last, attend_last;
  address_t linear_target_addr, attend_target_addr;
  logic [DataBits-1:0] linear_target, attend_target;
  wire logic attending = state_q == Attend;

  axi_writer #(
      .DataBits(DataBits),
      .AddrBits(AddrBits)
  ) u_writer (
      .clk_i,
      .rst_i        (reset),
      .cmd_valid_i  (attending ? attend_target_cmd : linear_target_cmd),
      .cmd_ready_o  (target_cmd_ready),
      .cmd_addr_i   (attending ? attend_target_addr : linear_target_addr),
      .cmd_beats_i  (24'(run.out_beats)),
      .in_valid_i   (attending ? attend_target_valid : linear_target_valid),
      .in_ready_o   (target_ready),
      .in_data_i    (attending ? attend_target : linear_target),
      .in_last_i    (attending ? attend_last : linear_last),
      .idle_o       (writer_idle),
      .short_frame_o(writer_short),
      .long_frame_o (writer_long),
      .bus_error_o  (writer_error),
      .m_axi_awaddr (m_axi_x_awaddr),
      .m_axi_awlen  (m_axi_x_awlen),
      .m_axi_awsize (m_axi_x_awsize),
      .m_axi_awburst(m_axi_x_awburst),
      .m_axi_awvalid(m_axi_x_awvalid),
      .m_axi_awready(m_axi_x_awready),
      .m_axi_wdata  (m_axi_x_wdata),
      .m_axi_wstrb  (m_axi_x_wstrb),
      .m_axi_wlast  (m_axi_x_wlast),
      .m_axi_wvalid (m_axi_x_wvalid),
      .m_axi_wready (m_axi_x_wready),
      .m_axi_bresp  (m_axi_x_bresp),
      .m_axi_bvalid (m_axi_x_bvalid),
      .m_axi_bready (m_axi_x_bready)
  );

  // --- LINEAR
  logic weights_cmd_valid, weights_cmd_ready, weights_valid, weights_ready, weights_error;
  logic [767:0] weights_data;
  logic [6:0] linear_status;

  weight_reader #(
      .DataBits(DataBits),
      .AddrBits(AddrBits)
  ) u_weights (
      .clk_i,
      .rst_i      (reset),
      .cmd_valid_i(weights_cmd_valid),
      .cmd_ready_o(weights_cmd_ready),
      .cmd_addr_i (run.weights),
      .cmd_beats_i(run.weight_beats),
      .out_valid_o(weights_valid),
      .out_ready_i(weights_ready),
      .out_data_o (weights_data),
      .bus_error_o(weights_error),
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
      .rst_i              (reset),
      .start_i            (state_q == Begin && !run.attend),
      .run_i              (run),
      .busy_o             (linear_busy),
      .bad_o              (linear_bad),
      .phase_o            (phase[2:0]),
      .weight_beat_o      (count[0]),
      .weights_cmd_valid_o(weights_cmd_valid),
      .weights_cmd_ready_i(weights_cmd_ready),
      .weights_valid_i    (weights_valid),
      .weights_ready_o    (weights_ready),
      .weights_data_i     (weights_data),
      .source_cmd_valid_o (linear_source_valid),
      .source_cmd_ready_i (source_cmd_ready && state_q == Linear),
      .source_cmd_addr_o  (linear_source_addr),
      .source_valid_i     (source_valid && state_q == Linear),
      .source_ready_o     (linear_source_ready),
      .source_data_i      (source_data),
      .source_last_i      (source_last),
      .side_cmd_valid_o   (side_cmd_valid),
      .side_cmd_ready_i   (side_cmd_ready),
      .side_cmd_addr_o    (side_cmd_addr),
      .side_valid_i       (side_valid),
      .side_ready_o       (side_ready),
      .side_data_i        (side_data),
      .target_cmd_valid_o (linear_target_cmd),
      .target_cmd_ready_i (target_cmd_ready && !attending),
      .target_cmd_addr_o  (linear_target_addr),
      .target_valid_o     (linear_target_valid),
      .target_ready_i     (target_ready && !attending),
      .target_data_o      (linear_target),
      .target_last_o      (linear_last),
      .target_idle_i      (writer_idle),
      .status_o           (linear_status)
  );

  // --- ATTEND
  logic cache_cmd, k_cmd_ready, v_cmd_ready, k_valid, k_ready, v_valid, v_ready, unused_k_last, unused_v_last;
  logic k_error, v_error;
  address_t k_cmd_addr, v_cmd_addr;
  logic [23:0] cache_cmd_beats;
  logic [DataBits-1:0] k_data, v_data;
  logic [2:0] attend_status;
  wire logic cache_ready = k_cmd_ready && v_cmd_ready;

  axi_reader #(
      .DataBits(DataBits),
      .AddrBits(AddrBits)
  ) u_keys (
      .clk_i,
      .rst_i        (reset),
      .cmd_valid_i  (cache_cmd && v_cmd_ready),
      .cmd_ready_o  (k_cmd_ready),
      .cmd_addr_i   (k_cmd_addr),
      .cmd_beats_i  (cache_cmd_beats),
      .out_valid_o  (k_valid),
      .out_ready_i  (k_ready),
      .out_data_o   (k_data),
      .out_last_o   (unused_k_last),
      .bus_error_o  (k_error),
      .m_axi_araddr (m_axi_k_araddr),
      .m_axi_arlen  (m_axi_k_arlen),
      .m_axi_arsize (m_axi_k_arsize),
      .m_axi_arburst(m_axi_k_arburst),
      .m_axi_arvalid(m_axi_k_arvalid),
      .m_axi_arready(m_axi_k_arready),
      .m_axi_rdata  (m_axi_k_rdata),
      .m_axi_rresp  (m_axi_k_rresp),
      .m_axi_rlast  (m_axi_k_rlast),
      .m_axi_rvalid (m_axi_k_rvalid),
      .m_axi_rready (m_axi_k_rready)
  );

  axi_reader #(
      .DataBits(DataBits),
      .AddrBits(AddrBits)
  ) u_values (
      .clk_i,
      .rst_i        (reset),
      .cmd_valid_i  (cache_cmd && k_cmd_ready),
      .cmd_ready_o  (v_cmd_ready),
      .cmd_addr_i   (v_cmd_addr),
      .cmd_beats_i  (cache_cmd_beats),
      .out_valid_o  (v_valid),
      .out_ready_i  (v_ready),
      .out_data_o   (v_data),
      .out_last_o   (unused_v_last),
      .bus_error_o  (v_error),
      .m_axi_araddr (m_axi_v_araddr),
      .m_axi_arlen  (m_axi_v_arlen),
      .m_axi_arsize (m_axi_v_arsize),
      .m_axi_arburst(m_axi_v_arburst),
      .m_axi_arvalid(m_axi_v_arvalid),
      .m_axi_arready(m_axi_v_arready),
      .m_axi_rdata  (m_axi_v_rdata),
      .m_axi_rresp  (m_axi_v_rresp),
      .m_axi_rlast  (m_axi_v_rlast),
      .m_axi_rvalid (m_axi_v_rvalid),
      .m_axi_rready (m_axi_v_rready)
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
      .start_i           (state_q == Begin && run.attend),
      .run_i             (run),
      .busy_o            (attend_busy),
      .key_row_o         (count[1]),
      .value_row_o       (count[2]),
      .keys_i            (bases[6*AddrBits+:AddrBits]),
      .values_i          (bases[7*AddrBits+:AddrBits]),
      .q_cmd_valid_o     (q_cmd_valid),
      .q_cmd_ready_i     (source_cmd_ready && attending),
      .q_cmd_addr_o      (q_cmd_addr),
      .q_valid_i         (source_valid && attending),
      .q_ready_o         (q_ready),
      .q_data_i          (source_data),
      .cache_cmd_valid_o (cache_cmd),
      .cache_cmd_ready_i (cache_ready),
      .k_cmd_addr_o      (k_cmd_addr),
      .v_cmd_addr_o      (v_cmd_addr),
      .cache_cmd_beats_o (cache_cmd_beats),
      .k_valid_i         (k_valid),
      .k_ready_o         (k_ready),
      .k_data_i          (k_data),
      .v_valid_i         (v_valid),
      .v_ready_o         (v_ready),
      .v_data_i          (v_data),
      .target_cmd_valid_o(attend_target_cmd),
      .target_cmd_ready_i(target_cmd_ready && attending),
      .target_cmd_addr_o (attend_target_addr),
      .target_valid_o    (attend_target_valid),
      .target_ready_i    (target_ready && attending),
      .target_data_o     (attend_target),
      .target_last_o     (attend_last),
      .target_idle_i     (writer_idle),
      .status_o          (attend_status)
  );

  // --- status and counters
  assign phase[3] = attending;
  assign count[3] = state_q == Decode && fetched;

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
    status[contract_pkg::StatusBusError]      = source_error || side_error || weights_error || k_error || v_error || writer_error;
    status[contract_pkg::StatusBadDescriptor] = bad_q;
  end

endmodule

`default_nettype wire
