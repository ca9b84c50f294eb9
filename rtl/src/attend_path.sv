// SPDX-License-Identifier: Apache-2.0
// An ATTEND: blocks of P queries from the newest row down, each over the cache from its newest query's position on. Queries and
// results are rows of buffers, keys and values one run of the cache a block.
`default_nettype none

module attend_path
  import run_pkg::*;
#(
    parameter int unsigned P = 4,
    parameter int unsigned Lanes = 16,
    parameter int unsigned HeadsMax = 16,
    parameter int unsigned KvHeadsMax = 16,
    parameter int unsigned BeatsMax = 96,
    localparam int unsigned DataBits = 16 * Lanes
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                start_i,
    input  wire run_t                run_i,  // steady from start_i until busy_o falls
    output logic                     busy_o,
    output logic                     key_row_o,
    output logic                     value_row_o,
    input  wire address_t            keys_i,  // of the cache's layer 0
    input  wire address_t            values_i,
    output logic                     q_cmd_valid_o,
    input  wire logic                q_cmd_ready_i,
    output address_t                 q_cmd_addr_o,
    input  wire logic                q_valid_i,
    output logic                     q_ready_o,
    input  wire logic [DataBits-1:0] q_data_i,
    output logic                     target_cmd_valid_o,
    input  wire logic                target_cmd_ready_i,
    output address_t                 target_cmd_addr_o,
    output logic                     target_valid_o,
    input  wire logic                target_ready_i,
    output logic      [DataBits-1:0] target_data_o,
    output logic                     target_last_o,
    input  wire logic                target_idle_i,
    // sticky: NONFINITE, SATURATED, SCORE_CLAMP
    output logic      [         2:0] status_o,
    output logic                     bus_error_o,  // sticky: of keys and values
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
    output logic                     m_axi_v_rready
);

  localparam int unsigned QueryBits = $clog2(P + 1);

  logic running_q, started_q, cmd_ready, take, q_done, target_done;
  logic [15:0] left_q, out_left_q;  // rows without a block; rows that have not come out
  logic [12:0] keys_q;
  logic [QueryBits-1:0] queries;
  logic [23:0] cache_beats;
  logic k_cmd_ready, v_cmd_ready, k_valid, k_ready, v_valid, v_ready, k_error, v_error, unused_k_last, unused_v_last;
  logic [DataBits-1:0] k_data, v_data;
  address_t offset_q, row_bytes, last_row;

  assign busy_o      = running_q;
  assign queries     = left_q < 16'(P) ? QueryBits'(left_q) : QueryBits'(P);
  // A block begins when both readers and the unit take it.
  assign take        = running_q && !started_q && left_q != '0 && cmd_ready && k_cmd_ready && v_cmd_ready;
  assign cache_beats = 24'(keys_q) * 24'(run_i.kv_beats);

  assign row_bytes = address_t'(run_i.out_beats) * address_t'(2 * Lanes);
  assign last_row  = (address_t'(run_i.rows) - address_t'(1)) * row_bytes;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      running_q <= 1'b0;
      started_q <= 1'b0;
    end else begin
      started_q <= start_i;
      if (start_i) running_q <= 1'b1;
      else if (running_q && !started_q && out_left_q == '0 && q_done && target_done && target_idle_i) running_q <= 1'b0;
    end
    if (start_i) begin
      left_q     <= run_i.rows;
      out_left_q <= run_i.rows;
      keys_q     <= run_i.first + 13'(run_i.rows);
      offset_q   <= run_i.cache;
    end else begin
      if (take) begin
        left_q   <= left_q - 16'(queries);
        keys_q   <= keys_q - 13'(queries);
        offset_q <= offset_q + address_t'(queries) * (address_t'(run_i.kv_beats) * address_t'(2 * Lanes));
      end
      if (target_valid_o && target_ready_i && target_last_o) out_left_q <= out_left_q - 16'd1;
    end
  end

  row_commands u_queries (
      .clk_i,
      .rst_i,
      .start_i    (started_q),
      .base_i     (run_i.source + last_row),
      .stride_i   (-row_bytes),
      .rows_i     (run_i.rows),
      .gate_i     ('1),
      .done_o     (q_done),
      .cmd_valid_o(q_cmd_valid_o),
      .cmd_ready_i(q_cmd_ready_i),
      .cmd_addr_o (q_cmd_addr_o)
  );

  row_commands u_target (
      .clk_i,
      .rst_i,
      .start_i    (started_q),
      .base_i     (run_i.target + last_row),
      .stride_i   (-row_bytes),
      .rows_i     (run_i.rows),
      .gate_i     ('1),
      .done_o     (target_done),
      .cmd_valid_o(target_cmd_valid_o),
      .cmd_ready_i(target_cmd_ready_i),
      .cmd_addr_o (target_cmd_addr_o)
  );

  axi_reader #(
      .DataBits(DataBits),
      .AddrBits(AddrBits)
  ) u_keys (
      .clk_i,
      .rst_i,
      .cmd_valid_i  (take),
      .cmd_ready_o  (k_cmd_ready),
      .cmd_addr_i   (keys_i + offset_q),
      .cmd_beats_i  (cache_beats),
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
      .rst_i,
      .cmd_valid_i  (take),
      .cmd_ready_o  (v_cmd_ready),
      .cmd_addr_i   (values_i + offset_q),
      .cmd_beats_i  (cache_beats),
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

  assign bus_error_o = k_error || v_error;

  attention #(
      .P(P),
      .Lanes(Lanes),
      .HeadsMax(HeadsMax),
      .KvHeadsMax(KvHeadsMax),
      .BeatsMax(BeatsMax)
  ) u_attention (
      .clk_i,
      .rst_i,
      .cmd_valid_i     (take),
      .cmd_ready_o     (cmd_ready),
      .cmd_heads_i     (run_i.heads),
      .cmd_kv_heads_i  (run_i.kv_heads),
      .cmd_head_beats_i(run_i.head_beats),
      .cmd_queries_i   (queries),
      .cmd_keys_i      (keys_q),
      .cmd_mantissa_i  (run_i.mantissa),
      .cmd_exponent_i  (run_i.exponent),
      .q_valid_i,
      .q_ready_o,
      .q_data_i,
      .k_valid_i       (k_valid),
      .k_ready_o       (k_ready),
      .k_data_i        (k_data),
      .v_valid_i       (v_valid),
      .v_ready_o       (v_ready),
      .v_data_i        (v_data),
      .out_valid_o     (target_valid_o),
      .out_ready_i     (target_ready_i),
      .out_data_o      (target_data_o),
      .out_last_o      (target_last_o),
      .nonfinite_o     (status_o[0]),
      .saturated_o     (status_o[1]),
      .score_clamp_o   (status_o[2])
  );

  // --- rows of the cache that have come
  logic [15:0] k_beat_q, v_beat_q;
  assign key_row_o   = k_valid && k_ready && k_beat_q + 16'd1 == run_i.kv_beats;
  assign value_row_o = v_valid && v_ready && v_beat_q + 16'd1 == run_i.kv_beats;

  always_ff @(posedge clk_i) begin
    if (start_i) begin
      k_beat_q <= '0;
      v_beat_q <= '0;
    end else begin
      if (k_valid && k_ready) k_beat_q <= key_row_o ? '0 : k_beat_q + 16'd1;
      if (v_valid && v_ready) v_beat_q <= value_row_o ? '0 : v_beat_q + 16'd1;
    end
  end

endmodule

`default_nettype wire
