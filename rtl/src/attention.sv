// SPDX-License-Identifier: Apache-2.0
// Causal attention of a block of up to P queries, one recurrence for prompts and decoding. Queries come newest first and stay;
// keys and values stream by once, newest first, the i-th query from the newest skips the i newest keys. Each query has dot
// products, softmax and sums of its own; keys and values are aligned once for all.
//
// Cycles a key: max(heads * head_beats, Period), if rows of keys and values come as fast; then heads * 36 for reciprocals
// and queries * heads * head_beats for the results. While one head's values are added the next one's products are formed.
//
// heads is a multiple of kv_heads; queries at most keys. The caller keeps to the parameters.
`default_nettype none

module attention #(
    parameter int unsigned P = 4,
    parameter int unsigned Lanes = 16,
    parameter int unsigned HeadsMax = 16,
    parameter int unsigned KvHeadsMax = 16,
    parameter int unsigned BeatsMax = 96,  // of a row of queries
    localparam int unsigned QueryBits = $clog2(P + 1)
) (
    input  wire logic                    clk_i,
    input  wire logic                    rst_i,
    input  wire logic                    cmd_valid_i,
    output logic                         cmd_ready_o,
    input  wire logic        [      7:0] cmd_heads_i,
    input  wire logic        [      7:0] cmd_kv_heads_i,
    input  wire logic        [      7:0] cmd_head_beats_i,
    input  wire logic    [QueryBits-1:0] cmd_queries_i,
    input  wire logic        [     12:0] cmd_keys_i,
    input  wire logic        [     16:0] cmd_mantissa_i,
    input  wire logic signed [      7:0] cmd_exponent_i,
    input  wire logic                    q_valid_i,
    output logic                         q_ready_o,
    input  wire logic     [Lanes*16-1:0] q_data_i,
    input  wire logic                    k_valid_i,
    output logic                         k_ready_o,
    input  wire logic     [Lanes*16-1:0] k_data_i,
    input  wire logic                    v_valid_i,
    output logic                         v_ready_o,
    input  wire logic     [Lanes*16-1:0] v_data_i,
    output logic                         out_valid_o,
    input  wire logic                    out_ready_i,
    output logic          [Lanes*16-1:0] out_data_o,
    output logic                         out_last_o,
    output logic                         nonfinite_o,
    output logic                         saturated_o,
    output logic                         score_clamp_o
);

  localparam int unsigned Rows = 4;  // of keys and of values: one is read, one waits, two cover what the other way takes
  localparam int unsigned Period = 8;  // a sum is back in its store before the next key's update
  localparam int unsigned RowBits = $clog2(Rows);
  localparam int unsigned HeadBits = HeadsMax > 1 ? $clog2(HeadsMax) : 1;
  localparam int unsigned KvBits = KvHeadsMax > 1 ? $clog2(KvHeadsMax) : 1;
  localparam int unsigned BeatBits = BeatsMax > 1 ? $clog2(BeatsMax) : 1;

  if (Lanes < 1 || (Lanes & (Lanes - 1)) != 0) begin : gen_illegal_lanes
    $error("attention: Lanes %0d is no power of two", Lanes);
  end
  if (P < 1 || KvHeadsMax > HeadsMax) begin : gen_illegal_sizes
    $error("attention: P %0d, %0d key heads of %0d; at least one query, at most as many key heads", P, KvHeadsMax, HeadsMax);
  end

  typedef enum logic [2:0] {
    Idle,
    LoadQueries,
    Keys,
    Drain,
    Finish
  } state_e;

  state_e state_q;
  logic [7:0] heads_q, kv_heads_q, head_beats_q;
  logic [QueryBits-1:0] queries_q;
  logic [12:0] keys_q;
  logic [16:0] mantissa_q;
  logic signed [7:0] exponent_q;
  logic start, begin_q, finishing;

  assign cmd_ready_o = state_q == Idle;
  assign start       = cmd_valid_i && cmd_ready_o;

  always_ff @(posedge clk_i) begin
    if (start) begin
      heads_q      <= cmd_heads_i;
      kv_heads_q   <= cmd_kv_heads_i;
      head_beats_q <= cmd_head_beats_i;
      queries_q    <= cmd_queries_i;
      keys_q       <= cmd_keys_i;
      mantissa_q   <= cmd_mantissa_i;
      exponent_q   <= cmd_exponent_i;
    end
    begin_q <= start && !rst_i;
  end

  // --- rows in
  logic q_write, k_write, v_write, q_first, k_first, v_first;
  logic [(P > 1 ? $clog2(P) : 1)-1:0] q_row;
  logic [RowBits-1:0] k_row, v_row;
  logic [HeadBits-1:0] q_head;
  logic [KvBits-1:0] k_head, v_head;
  logic [BeatBits-1:0] q_beat, k_beat, v_beat;
  logic [12:0] q_loaded, k_loaded, v_loaded, dots_q, added_q;

  row_loader #(
      .Rows(P),
      .HeadsMax(HeadsMax),
      .BeatsMax(BeatsMax)
  ) u_q_loader (
      .clk_i,
      .rst_i,
      .start_i     (begin_q),
      .rows_i      (13'(queries_q)),
      .heads_i     (heads_q),
      .head_beats_i(head_beats_q),
      .room_i      (1'b1),
      .valid_i     (q_valid_i),
      .ready_o     (q_ready_o),
      .write_o     (q_write),
      .row_o       (q_row),
      .head_o      (q_head),
      .beat_o      (q_beat),
      .first_o     (q_first),
      .loaded_o    (q_loaded)
  );

  row_loader #(
      .Rows(Rows),
      .HeadsMax(KvHeadsMax),
      .BeatsMax(BeatsMax)
  ) u_k_loader (
      .clk_i,
      .rst_i,
      .start_i     (begin_q),
      .rows_i      (keys_q),
      .heads_i     (kv_heads_q),
      .head_beats_i(head_beats_q),
      .room_i      (k_loaded - added_q < 13'(Rows)),
      .valid_i     (k_valid_i),
      .ready_o     (k_ready_o),
      .write_o     (k_write),
      .row_o       (k_row),
      .head_o      (k_head),
      .beat_o      (k_beat),
      .first_o     (k_first),
      .loaded_o    (k_loaded)
  );

  row_loader #(
      .Rows(Rows),
      .HeadsMax(KvHeadsMax),
      .BeatsMax(BeatsMax)
  ) u_v_loader (
      .clk_i,
      .rst_i,
      .start_i     (begin_q),
      .rows_i      (keys_q),
      .heads_i     (kv_heads_q),
      .head_beats_i(head_beats_q),
      .room_i      (v_loaded - added_q < 13'(Rows)),
      .valid_i     (v_valid_i),
      .ready_o     (v_ready_o),
      .write_o     (v_write),
      .row_o       (v_row),
      .head_o      (v_head),
      .beat_o      (v_beat),
      .first_o     (v_first),
      .loaded_o    (v_loaded)
  );

  // --- products: a beat of a head a cycle, for a key that has come as a whole
  logic dot_issue, dot_first, dot_last, dot_row_last;
  logic [HeadBits-1:0] dot_head;
  logic [KvBits-1:0] dot_kv_head;
  logic [BeatBits-1:0] dot_beat, dot_kv_beat;
  logic dot_running_q;
  logic [3:0] period_q;

  assign dot_issue = dot_running_q || (state_q == Keys && dots_q < keys_q && dots_q < k_loaded && dots_q < v_loaded && period_q == '0);

  head_walk #(
      .HeadsMax(HeadsMax),
      .KvHeadsMax(KvHeadsMax),
      .BeatsMax(BeatsMax)
  ) u_dots (
      .clk_i,
      .start_i     (begin_q),
      .heads_i     (heads_q),
      .kv_heads_i  (kv_heads_q),
      .head_beats_i(head_beats_q),
      .step_i      (dot_issue),
      .first_o     (dot_first),
      .last_o      (dot_last),
      .row_last_o  (dot_row_last),
      .head_o      (dot_head),
      .beat_o      (dot_beat),
      .kv_head_o   (dot_kv_head),
      .kv_beat_o   (dot_kv_beat)
  );

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      dot_running_q <= 1'b0;
      period_q      <= '0;
    end else begin
      if (dot_issue) dot_running_q <= !dot_row_last;
      if (dot_issue && !dot_running_q) period_q <= 4'(Period - 1);
      else if (period_q != '0) period_q <= period_q - 4'd1;
    end
    if (begin_q) dots_q <= '0;
    else if (dot_issue && dot_row_last) dots_q <= dots_q + 13'd1;
  end

  // --- the two stages from a place to aligned beats
  logic [Lanes*16-1:0] k_data, v_data;
  logic signed [5:0] k_top, v_top, k_top_q, v_top_q, v_top_q2;
  logic signed [5:0] v_written_top;
  logic [Lanes*18-1:0] k_aligned;
  logic [Lanes*15-1:0] v_aligned;
  logic [P-1:0] wild_q;
  logic wild_k, wild_v;

  logic signed [5:0] unused_k_top;

  head_rows #(
      .Lanes(Lanes),
      .Rows(Rows),
      .HeadsMax(KvHeadsMax),
      .BeatsMax(BeatsMax)
  ) u_keys (
      .clk_i,
      .write_i      (k_write),
      .write_row_i  (k_row),
      .write_head_i (k_head),
      .write_beat_i (k_beat),
      .write_first_i(k_first),
      .write_data_i (k_data_i),
      .read_row_i   (dots_q[RowBits-1:0]),
      .read_head_i  (dot_kv_head),
      .read_beat_i  (dot_kv_beat),
      .data_o       (k_data),
      .top_o        (k_top),
      .written_top_o(unused_k_top),
      .nonfinite_o  (wild_k)
  );

  align_lanes #(
      .Lanes(Lanes),
      .Width(17)
  ) u_align_k (
      .clk_i,
      .data_i   (k_data),
      .top_i    (k_top),
      .aligned_o(k_aligned)
  );

  // Exponents of values once more, for the scores.
  (* ram_style = "distributed" *)
  logic [5:0] v_tops[Rows<<KvBits];
  always_ff @(posedge clk_i) begin
    if (v_write) v_tops[{v_row, v_head}] <= v_written_top;
    v_top_q  <= signed'(v_tops[{dots_q[RowBits-1:0], dot_kv_head}]);
    v_top_q2 <= v_top_q;
    k_top_q  <= k_top;
  end

  // valid, first, last, key, head
  localparam int unsigned TagBits = 3 + 13 + HeadBits;
  logic [TagBits-1:0] tag_q, tag_q2;
  always_ff @(posedge clk_i) begin
    tag_q  <= {dot_issue && !rst_i, dot_first, dot_last, dots_q, dot_head};
    tag_q2 <= tag_q;
    if (rst_i) tag_q2[TagBits-1] <= 1'b0;
  end

  // --- values: a head's beats as soon as its step is there
  logic [P-1:0] step_valid;
  logic [P*27-1:0] steps, step;
  logic step_ready, steps_ready, add_issue, add_last, add_row_last, unused_add_first;
  logic [HeadBits-1:0] unused_add_head;
  logic [KvBits-1:0] add_kv_head;
  logic [BeatBits-1:0] add_beat, add_kv_beat;
  logic [3:0] unused_steps;

  fifo #(
      .Width(P * 27),
      .Depth(8)
  ) u_steps (
      .clk_i,
      .rst_i,
      .valid_i(step_valid[0]),
      .ready_o(steps_ready),
      .data_i (steps),
      .valid_o(step_ready),
      .ready_i(add_issue && add_last),
      .data_o (step),
      .count_o(unused_steps)
  );
  assign add_issue = step_ready;

  head_walk #(
      .HeadsMax(HeadsMax),
      .KvHeadsMax(KvHeadsMax),
      .BeatsMax(BeatsMax)
  ) u_adds (
      .clk_i,
      .start_i     (begin_q),
      .heads_i     (heads_q),
      .kv_heads_i  (kv_heads_q),
      .head_beats_i(head_beats_q),
      .step_i      (add_issue),
      .first_o     (unused_add_first),
      .last_o      (add_last),
      .row_last_o  (add_row_last),
      .head_o      (unused_add_head),
      .beat_o      (add_beat),
      .kv_head_o   (add_kv_head),
      .kv_beat_o   (add_kv_beat)
  );

  always_ff @(posedge clk_i) begin
    if (begin_q) added_q <= '0;
    else if (add_issue && add_row_last) added_q <= added_q + 13'd1;
  end

  head_rows #(
      .Lanes(Lanes),
      .Rows(Rows),
      .HeadsMax(KvHeadsMax),
      .BeatsMax(BeatsMax)
  ) u_values (
      .clk_i,
      .write_i      (v_write),
      .write_row_i  (v_row),
      .write_head_i (v_head),
      .write_beat_i (v_beat),
      .write_first_i(v_first),
      .write_data_i (v_data_i),
      .read_row_i   (added_q[RowBits-1:0]),
      .read_head_i  (add_kv_head),
      .read_beat_i  (add_kv_beat),
      .data_o       (v_data),
      .top_o        (v_top),
      .written_top_o(v_written_top),
      .nonfinite_o  (wild_v)
  );

  align_lanes #(
      .Lanes(Lanes),
      .Width(14)
  ) u_align_v (
      .clk_i,
      .data_i   (v_data),
      .top_i    (v_top),
      .aligned_o(v_aligned)
  );

  // --- queries
  logic [HeadBits-1:0] state_head;
  logic [P*34-1:0] totals;
  logic [P*15-1:0] tops, value_tops;
  logic [P*Lanes*48-1:0] sums;
  logic [P-1:0] clamped;
  logic read;
  logic [BeatBits-1:0] read_beat;

  for (genvar query = 0; query < P; query++) begin : gen_query
    logic [Lanes*16-1:0] q_data;
    logic signed [5:0] q_top, q_top_q, unused_q_top;
    logic [Lanes*18-1:0] q_aligned;
    logic sees, adds;

    head_rows #(
        .Lanes(Lanes),
        .Rows(1),
        .HeadsMax(HeadsMax),
        .BeatsMax(BeatsMax)
    ) u_query (
        .clk_i,
        .write_i      (q_write && 32'(q_row) == query),
        .write_row_i  (1'b0),
        .write_head_i (q_head),
        .write_beat_i (q_beat),
        .write_first_i(q_first),
        .write_data_i (q_data_i),
        .read_row_i   (1'b0),
        .read_head_i  (dot_head),
        .read_beat_i  (dot_beat),
        .data_o       (q_data),
        .top_o        (q_top),
        .written_top_o(unused_q_top),
        .nonfinite_o  (wild_q[query])
    );

    align_lanes #(
        .Lanes(Lanes),
        .Width(17)
    ) u_align_q (
        .clk_i,
        .data_i   (q_data),
        .top_i    (q_top),
        .aligned_o(q_aligned)
    );
    always_ff @(posedge clk_i) q_top_q <= q_top;

    assign sees = query < 32'(queries_q) && tag_q2[HeadBits+:13] >= 13'(query);
    assign adds = query < 32'(queries_q) && added_q >= 13'(query);

    attention_score #(
        .Lanes(Lanes),
        .HeadsMax(HeadsMax)
    ) u_score (
        .clk_i,
        .rst_i,
        .valid_i      (tag_q2[TagBits-1]),
        .first_i      (tag_q2[TagBits-2]),
        .last_i       (tag_q2[TagBits-3]),
        .active_i     (sees),
        .fresh_i      (tag_q2[HeadBits+:13] == 13'(query)),
        .head_i       (tag_q2[HeadBits-1:0]),
        .q_i          (q_aligned),
        .k_i          (k_aligned),
        .q_top_i      (q_top_q),
        .k_top_i      (k_top_q),
        .v_top_i      (v_top_q2),
        .mantissa_i   (mantissa_q),
        .exponent_i   (exponent_q),
        .step_valid_o (step_valid[query]),
        .step_weight_o(steps[query*27+:21]),
        .step_shift_o (steps[query*27+21+:6]),
        .clamped_o    (clamped[query]),
        .read_head_i  (state_head),
        .total_o      (totals[query*34+:34]),
        .top_o        (tops[query*15+:15]),
        .value_top_o  (value_tops[query*15+:15])
    );

    attention_sums #(
        .Lanes(Lanes),
        .BeatsMax(BeatsMax)
    ) u_sums (
        .clk_i,
        .rst_i,
        .update_i(add_issue && adds),
        .fresh_i (added_q == 13'(query)),
        .beat_i  (finishing ? read_beat : add_beat),
        .shift_i (step[query*27+21+:6]),
        .weight_i(step[query*27+:21]),
        .v_i     (v_aligned),
        .read_i  (read),
        .sums_o  (sums[query*Lanes*48+:Lanes*48])
    );
  end

  // --- the block's way
  logic [3:0] settle_q;
  logic finish_busy, finish_start_q, late;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      state_q        <= Idle;
      finish_start_q <= 1'b0;
    end else begin
      finish_start_q <= 1'b0;
      case (state_q)
        Idle:        if (start) state_q <= LoadQueries;
        LoadQueries: if (!begin_q && q_loaded == 13'(queries_q)) state_q <= Keys;
        Keys:        if (added_q == keys_q) state_q <= Drain;
        Drain: begin
          if (settle_q == '0) begin
            state_q        <= Finish;
            finish_start_q <= 1'b1;
          end
        end
        default:     if (!finish_start_q && !finish_busy) state_q <= Idle;
      endcase
    end
    // The last update is in its store.
    settle_q <= state_q == Drain ? settle_q - 4'd1 : 4'd6;
  end

  assign finishing = state_q == Finish;

  attention_finish #(
      .P(P),
      .Lanes(Lanes),
      .HeadsMax(HeadsMax),
      .BeatsMax(BeatsMax)
  ) u_finish (
      .clk_i,
      .rst_i,
      .start_i     (finish_start_q),
      .busy_o      (finish_busy),
      .heads_i     (heads_q),
      .head_beats_i(head_beats_q),
      .queries_i   (queries_q),
      .state_head_o(state_head),
      .totals_i    (totals),
      .tops_i      (tops),
      .value_tops_i(value_tops),
      .read_o      (read),
      .read_beat_o (read_beat),
      .sums_i      (sums),
      .out_valid_o,
      .out_ready_i,
      .out_data_o,
      .out_last_o,
      .saturated_o (late)
  );

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      nonfinite_o   <= 1'b0;
      saturated_o   <= 1'b0;
      score_clamp_o <= 1'b0;
    end else begin
      nonfinite_o   <= nonfinite_o || wild_q != '0 || wild_k || wild_v;
      saturated_o   <= saturated_o || late;
      score_clamp_o <= score_clamp_o || clamped != '0;
    end
  end

`ifdef VERILATOR
  always_ff @(posedge clk_i) begin
    if (!rst_i) begin
      assert (!step_valid[0] || steps_ready)
      else $error("attention: a step without a place");
    end
  end
`else
  wire logic unused_ready = &{1'b0, steps_ready};
`endif

endmodule

`default_nettype wire
