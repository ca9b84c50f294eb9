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
    parameter int unsigned BeatsMax = 96
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                start_i,
    input  wire run_t                run_i,  // steady from start_i until busy_o falls
    output logic                     busy_o,
    output logic                     key_row_o,
    output logic                     value_row_o,
    input  wire address_t            keys_i,    // of the cache's layer 0
    input  wire address_t            values_i,
    output logic                     q_cmd_valid_o,
    input  wire logic                q_cmd_ready_i,
    output address_t                 q_cmd_addr_o,
    input  wire logic                q_valid_i,
    output logic                     q_ready_o,
    input  wire logic [Lanes*16-1:0] q_data_i,
    output logic                     cache_cmd_valid_o,  // to both readers at once
    input  wire logic                cache_cmd_ready_i,
    output address_t                 k_cmd_addr_o,
    output address_t                 v_cmd_addr_o,
    output logic      [        23:0] cache_cmd_beats_o,
    input  wire logic                k_valid_i,
    output logic                     k_ready_o,
    input  wire logic [Lanes*16-1:0] k_data_i,
    input  wire logic                v_valid_i,
    output logic                     v_ready_o,
    input  wire logic [Lanes*16-1:0] v_data_i,
    output logic                     target_cmd_valid_o,
    input  wire logic                target_cmd_ready_i,
    output address_t                 target_cmd_addr_o,
    output logic                     target_valid_o,
    input  wire logic                target_ready_i,
    output logic      [Lanes*16-1:0] target_data_o,
    output logic                     target_last_o,
    input  wire logic                target_idle_i,
    // sticky: NONFINITE, SATURATED, SCORE_CLAMP
    output logic      [         2:0] status_o
);

  localparam int unsigned QueryBits = $clog2(P + 1);

  logic running_q, started_q, cmd_ready, take, q_done, target_done;
  logic [15:0] left_q, out_left_q;  // rows without a block; rows that have not come out
  logic [12:0] keys_q;
  logic [QueryBits-1:0] queries;
  address_t offset_q, row_bytes, last_row;

  assign busy_o            = running_q;
  assign queries           = left_q < 16'(P) ? QueryBits'(left_q) : QueryBits'(P);
  assign cache_cmd_valid_o = running_q && !started_q && left_q != '0 && cmd_ready;
  assign take              = cache_cmd_valid_o && cache_cmd_ready_i;
  assign k_cmd_addr_o      = keys_i + offset_q;
  assign v_cmd_addr_o      = values_i + offset_q;
  assign cache_cmd_beats_o = 24'(keys_q * run_i.kv_beats);

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
      .k_valid_i,
      .k_ready_o,
      .k_data_i,
      .v_valid_i,
      .v_ready_o,
      .v_data_i,
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
  assign key_row_o   = k_valid_i && k_ready_o && k_beat_q + 16'd1 == run_i.kv_beats;
  assign value_row_o = v_valid_i && v_ready_o && v_beat_q + 16'd1 == run_i.kv_beats;

  always_ff @(posedge clk_i) begin
    if (start_i) begin
      k_beat_q <= '0;
      v_beat_q <= '0;
    end else begin
      if (k_valid_i && k_ready_o) k_beat_q <= key_row_o ? '0 : k_beat_q + 16'd1;
      if (v_valid_i && v_ready_o) v_beat_q <= value_row_o ? '0 : v_beat_q + 16'd1;
    end
  end

endmodule

`default_nettype wire
