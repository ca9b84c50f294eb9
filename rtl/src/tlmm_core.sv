// SPDX-License-Identifier: Apache-2.0
// Ternary matrix product of one row of activations by table lookup: out[k] = sum over n of w[n][k] * a[n], exactly.
//
// A command names the beats of Q outputs and the blocks of T*G inputs. For each block the tables are filled (3^G cycles), then every
// cycle takes the index vectors of Q consecutive outputs, looks T entries up in each of Q lanes, adds them in a tree and
// adds the tree's sum to the outputs' accumulators; the last block's totals leave instead of being stored.
//
// Cycles: blocks * (beats + 3^G) with Banks = 1. With Banks = 2 the next block's tables fill during this
// block's sweep: 3^G + blocks * max(beats, 3^G) at least.
//
// Widths: a tree's sum is within T * G * 128; a total is within inputs * 128, so 32 bits hold up to 2^24 - 1 inputs, and
// BlocksMax is checked against that. An accumulator is read two cycles before it is written, so two visits of the same
// one must be three cycles apart: between them lie as many beats as the row has, and a gap where it has fewer than three.
//
// The pipeline never stalls: a result is let in only when the output buffer has a place for it.
`default_nettype none

module tlmm_core #(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    parameter int unsigned Q = 16,
    parameter int unsigned BeatsMax = 512,  // of Q outputs each
    parameter int unsigned BlocksMax = 256,
    parameter int unsigned Banks = 1,
    localparam int unsigned Entries = 3 ** G,
    localparam int unsigned IndexBits = $clog2(Entries),
    localparam int unsigned BeatsBits = $clog2(BeatsMax + 1),
    localparam int unsigned LaneBits = $clog2(Q + 1),
    localparam int unsigned BlocksBits = $clog2(BlocksMax + 1)
) (
    input  wire logic                       clk_i,
    input  wire logic                       rst_i,
    // a row: beats of Q outputs, how many of the last beat's are wanted, blocks of T*G inputs; none of them zero
    input  wire logic                       cmd_valid_i,
    output logic                            cmd_ready_o,
    input  wire logic [      BeatsBits-1:0] cmd_beats_i,
    input  wire logic [       LaneBits-1:0] cmd_tail_i,
    input  wire logic [     BlocksBits-1:0] cmd_blocks_i,
    // blocks of activations
    input  wire logic                       act_valid_i,
    output logic                            act_ready_o,
    input  wire logic [          T*G*8-1:0] act_data_i,
    // index vectors of Q outputs, the first lane's in the lowest bits
    input  wire logic                       w_valid_i,
    output logic                            w_ready_o,
    input  wire logic [Q*T*IndexBits-1:0]   w_data_i,
    // totals of Q outputs; lanes past the last output are not kept
    output logic                            out_valid_o,
    input  wire logic                       out_ready_i,
    output logic      [           Q*32-1:0] out_data_o,
    output logic      [              Q-1:0] out_keep_o,
    output logic                            out_last_o,
    output logic                            busy_o
);

  localparam int unsigned EntryBits = $clog2(G * 128 + 1) + 1;
  localparam int unsigned Depth = $clog2(T);
  localparam int unsigned RegisterEvery = 2;
  localparam int unsigned TreeLatency = Depth / RegisterEvery;
  localparam int unsigned SumBits = EntryBits + Depth;
  localparam int unsigned BeatBits = BeatsMax > 1 ? $clog2(BeatsMax) : 1;
  localparam int unsigned BankBits = Banks > 1 ? $clog2(Banks) : 1;
  // from letting a beat in to its total in the output buffer, and one more for the credit on its way back
  localparam int unsigned Latency = 1 + TreeLatency + 2;
  localparam int unsigned Places = 1 << $clog2(Latency + 2);
  localparam int unsigned CreditBits = $clog2(Places + 1);

  if (Q < 1) begin : gen_illegal_q
    $error("tlmm_core: Q %0d; at least one lane is needed", Q);
  end
  if (Banks != 1 && Banks != 2) begin : gen_illegal_banks
    $error("tlmm_core: Banks %0d; 1 or 2 are possible", Banks);
  end
  if (64'(BlocksMax) * T * G >= 64'd1 << 24) begin : gen_illegal_inputs
    $error("tlmm_core: %0d blocks of %0d inputs can leave 32 bits", BlocksMax, T * G);
  end

  // --- the row in hand
  logic active_q;
  logic [BeatBits-1:0] last_beat_q;
  logic [Q-1:0] last_keep_q;
  logic [BlocksBits-1:0] fills_left_q, sweeps_left_q;
  logic first_block_q;
  logic start, row_done;

  assign cmd_ready_o = !active_q;
  assign start       = cmd_valid_i && cmd_ready_o;
  assign busy_o      = active_q;

  // --- fill
  logic [Banks-1:0] filled_q;
  logic [BankBits-1:0] fill_bank_q, sweep_bank_q;
  logic fill_enable, fill_write, fill_done, fill_ready, block_done;
  logic [IndexBits-1:0] fill_index;
  logic [T*EntryBits-1:0] fill_entries;
  logic act_valid;
  logic [T*G*8-1:0] act_block;

  skid #(
      .Width(T * G * 8)
  ) u_act (
      .clk_i,
      .rst_i,
      .valid_i(act_valid_i),
      .ready_o(act_ready_o),
      .data_i (act_data_i),
      .valid_o(act_valid),
      .ready_i(fill_ready),
      .data_o (act_block)
  );

  assign fill_enable = active_q && fills_left_q != '0 && !filled_q[fill_bank_q];

  tl_precompute #(
      .G(G),
      .T(T)
  ) u_precompute (
      .clk_i,
      .rst_i,
      .valid_i  (act_valid),
      .ready_o  (fill_ready),
      .block_i  (act_block),
      .enable_i (fill_enable),
      .write_o  (fill_write),
      .index_o  (fill_index),
      .entries_o(fill_entries),
      .done_o   (fill_done)
  );

  // --- sweep
  logic [BeatBits-1:0] beat_q;
  logic [CreditBits-1:0] credits_q;
  logic [1:0] gap_q;
  logic issue, last_beat, last_block, pop;

  assign last_beat  = beat_q == last_beat_q;
  assign last_block = sweeps_left_q == BlocksBits'(1);
  assign w_ready_o  = active_q && filled_q[sweep_bank_q] && gap_q == '0 && (!last_block || credits_q != '0);
  assign issue      = w_ready_o && w_valid_i;
  assign block_done = issue && last_beat;
  assign row_done   = block_done && last_block;
  assign pop        = out_valid_o && out_ready_i;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      active_q      <= 1'b0;
      fills_left_q  <= '0;
      sweeps_left_q <= '0;
      first_block_q <= 1'b1;
      filled_q      <= '0;
      fill_bank_q   <= '0;
      sweep_bank_q  <= '0;
      beat_q        <= '0;
      credits_q     <= CreditBits'(Places);
      gap_q         <= '0;
    end else begin
      if (gap_q != '0) gap_q <= gap_q - 1'b1;
      if (start) begin
        active_q      <= cmd_blocks_i != '0 && cmd_beats_i != '0;
        fills_left_q  <= cmd_blocks_i;
        sweeps_left_q <= cmd_blocks_i;
        first_block_q <= 1'b1;
      end
      if (row_done) active_q <= 1'b0;
      if (fill_done) begin
        fills_left_q          <= fills_left_q - 1'b1;
        filled_q[fill_bank_q] <= 1'b1;
        if (Banks > 1) fill_bank_q <= ~fill_bank_q;
      end
      if (issue) beat_q <= last_beat ? '0 : beat_q + 1'b1;
      if (block_done) begin
        sweeps_left_q          <= sweeps_left_q - 1'b1;
        first_block_q          <= 1'b0;
        gap_q                  <= last_beat_q == '0 ? 2'd2 : 2'(32'(last_beat_q) == 32'd1);
        filled_q[sweep_bank_q] <= 1'b0;
        if (Banks > 1) sweep_bank_q <= ~sweep_bank_q;
      end
      credits_q <= credits_q - CreditBits'(issue && last_block) + CreditBits'(pop);
    end
  end

  always_ff @(posedge clk_i) begin
    if (start) begin
      last_beat_q <= BeatBits'(cmd_beats_i - 1'b1);
      for (int unsigned lane = 0; lane < Q; lane++) last_keep_q[lane] <= LaneBits'(lane) < cmd_tail_i;
    end
  end

  // --- what travels with a beat
  typedef struct packed {
    logic                valid;
    logic                emit;
    logic                last;
    logic [BeatBits-1:0] beat;
    logic [Q-1:0]        keep;
  } tag_t;

  // As vectors, since not every tool takes an array of structures.
  localparam int unsigned TagBits = 3 + BeatBits + Q;
  logic [TagBits-1:0] tag[TreeLatency+3];
  // valid, emit, last, beat, keep
  assign tag[0] = {issue, last_block, last_beat && last_block, beat_q, last_beat ? last_keep_q : {Q{1'b1}}};
  for (genvar stage = 1; stage < TreeLatency + 3; stage++) begin : gen_tag
    logic [TagBits-1:0] tag_q;
    always_ff @(posedge clk_i) begin
      tag_q <= tag[stage-1];
      if (rst_i) tag_q[TagBits-1] <= 1'b0;
    end
    assign tag[stage] = tag_q;
  end

  logic [TreeLatency:0] first_q;
  always_ff @(posedge clk_i) first_q <= (TreeLatency + 1)'({first_q, first_block_q});

  // --- lanes: lookup, tree, accumulate
  tag_t totalled;
  logic [Q*32-1:0] totals;
  assign totalled = tag[TreeLatency+2];

  for (genvar lane = 0; lane < Q; lane++) begin : gen_lane
    logic [T*EntryBits-1:0] entries;
    logic [(1<<Depth)*EntryBits-1:0] terms;
    logic signed [SumBits-1:0] sum;
    (* ram_style = "block" *)
    logic [31:0] accumulators[BeatsMax];
    logic [31:0] accumulator_q, total_q;

    tl_table_bank #(
        .T(T),
        .IndexBits(IndexBits),
        .EntryBits(EntryBits),
        .Banks(Banks)
    ) u_tables (
        .clk_i,
        .write_i        (fill_write),
        .write_bank_i   (fill_bank_q),
        .write_index_i  (fill_index),
        .write_entries_i(fill_entries),
        .read_bank_i    (sweep_bank_q),
        .read_indices_i (w_data_i[lane*T*IndexBits+:T*IndexBits]),
        .entries_o      (entries)
    );

    always_comb begin
      terms = '0;
      terms[T*EntryBits-1:0] = entries;
    end

    adder_tree #(
        .Depth(Depth),
        .Width(EntryBits),
        .RegisterEvery(RegisterEvery)
    ) u_tree (
        .clk_i,
        .terms_i(terms),
        .sum_o  (sum)
    );

    always_ff @(posedge clk_i) begin
      accumulator_q <= accumulators[tag[TreeLatency][Q+:BeatBits]];
      total_q       <= (first_q[TreeLatency] ? 32'd0 : accumulator_q) + 32'(sum);
      if (totalled.valid && !totalled.emit) accumulators[totalled.beat] <= total_q;
    end
    assign totals[lane*32+:32] = total_q;
  end

  // --- totals leave; a credit was held for each, so the buffer has a place
  logic buffer_ready;
  logic [CreditBits-1:0] buffer_count;

  fifo #(
      .Width(Q * 33 + 1),
      .Depth(Places)
  ) u_out (
      .clk_i,
      .rst_i,
      .valid_i(totalled.valid && totalled.emit),
      .ready_o(buffer_ready),
      .data_i ({totalled.last, totalled.keep, totals}),
      .valid_o(out_valid_o),
      .ready_i(out_ready_i),
      .data_o ({out_last_o, out_keep_o, out_data_o}),
      .count_o(buffer_count)
  );

`ifdef VERILATOR
  always_ff @(posedge clk_i) begin
    if (!rst_i) begin
      assert (!(totalled.valid && totalled.emit) || buffer_ready)
      else $error("tlmm_core: a total without a place");
      assert (32'(credits_q) + 32'(buffer_count) <= 32'(Places))
      else $error("tlmm_core: more credits than places");
    end
  end
`else
  wire logic unused_buffer = &{1'b0, buffer_ready, buffer_count};
`endif

endmodule

`default_nettype wire
