// SPDX-License-Identifier: Apache-2.0
// tlmm_core's control, whatever the data: a credit for every total under way, so none is without a place; no accumulator is
// read before its last total is back; tables are not written while they are read; blocks are neither skipped nor repeated; a
// row that has what it asks for moves.
logic f_started = 1'b0;
always_ff @(posedge clk_i) f_started <= 1'b1;

always_comb begin
  if (!f_started) assume (rst_i);
  assume (32'(cmd_beats_i) <= BeatsMax && 32'(cmd_blocks_i) <= BlocksMax);
end

// Totals on their way to the output buffer, and full table sets.
logic [CreditBits-1:0] f_flying;
logic [BlocksBits-1:0] f_filled;
always_comb begin
  f_flying = '0;
  f_filled = '0;
  for (int unsigned stage = 1; stage < TreeLatency + 3; stage++) begin
    f_flying += CreditBits'(tag[stage][TagBits-1] && tag[stage][TagBits-2]);
  end
  for (int unsigned bank = 0; bank < Banks; bank++) f_filled += BlocksBits'(filled_q[bank]);
end

always_comb begin
  if (f_started && !rst_i) begin
    assert (32'(credits_q) + 32'(buffer_count) + 32'(f_flying) == Places);
    assert (!(totalled.valid && totalled.emit) || buffer_ready);

    assert (beat_q <= last_beat_q || !active_q);
    assert (active_q || beat_q == '0);
    assert (!active_q || 32'(sweeps_left_q) == 32'(fills_left_q) + 32'(f_filled));
    assert (active_q || f_filled == '0);
    assert (!active_q || sweeps_left_q != '0);
    assert (!fill_done || fills_left_q != '0);
    assert (!(fill_write && issue && fill_bank_q == sweep_bank_q));
    assert (Banks == 1 || !active_q || f_filled != BlocksBits'(1) || filled_q[sweep_bank_q]);
    assert (Banks == 1 || (fill_bank_q == sweep_bank_q) == !f_filled[0]);

    // What an accumulator reads must not be on its way to it, one cycle or two behind.
    for (int unsigned behind = 1; behind < 3; behind++) begin
      if (tag[TreeLatency][TagBits-1] && !first_q[TreeLatency]
          && tag[TreeLatency+behind][TagBits-1] && !tag[TreeLatency+behind][TagBits-2]) begin
        assert (tag[TreeLatency][Q+:BeatBits] != tag[TreeLatency+behind][Q+:BeatBits]);
      end
    end

    if (active_q && act_valid && w_valid_i && credits_q != '0) assert (issue || fill_write || gap_q != '0);
    if (credits_q == '0) assert (out_valid_o || f_flying != '0);
  end
end

logic [1:0] f_rows;
always_ff @(posedge clk_i) begin
  f_rows <= rst_i ? '0 : f_rows + 2'(row_done && f_rows != '1);
  // That the total offered stays the same is the fifo's proof.
  if (f_started && !rst_i && !$past(rst_i) && $past(out_valid_o && !out_ready_i)) assert (out_valid_o);
  cover (f_rows == 2'd2 && !out_valid_o);
  cover (out_valid_o && out_last_o && $past(out_valid_o && !out_last_o));
end
