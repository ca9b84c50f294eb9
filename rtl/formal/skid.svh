// SPDX-License-Identifier: Apache-2.0
// skid: nothing is lost, doubled or reordered; an offered beat stays; two fit and no more.
logic f_started = 1'b0;
always_ff @(posedge clk_i) f_started <= 1'b1;
always_comb if (!f_started) assume (rst_i);

logic f_push, f_pop;
logic [1:0] f_held;
assign f_push = valid_i && ready_o;
assign f_pop  = valid_o && ready_i;

// Any one beat that enters, wherever the solver likes: what it was, and how many leave before it.
(* anyseq *) logic f_pick;
logic f_tracked;
logic [1:0] f_ahead;
logic [Width-1:0] f_beat;

always_ff @(posedge clk_i) begin
  if (rst_i) begin
    f_held    <= '0;
    f_tracked <= 1'b0;
  end else begin
    f_held <= f_held + 2'(f_push) - 2'(f_pop);
    if (f_tracked && f_pop) begin
      f_ahead <= f_ahead - 1'b1;
      if (f_ahead == '0) f_tracked <= 1'b0;
    end
    if (!f_tracked && f_push && f_pick) begin
      f_tracked <= 1'b1;
      f_ahead   <= f_held - 2'(f_pop);
      f_beat    <= data_i;
    end
  end
end

always_comb begin
  if (f_started && !rst_i) begin
    assert (f_held == 2'(valid_q) + 2'(spare_valid_q));
    assert (valid_o == (f_held != '0));
    assert (ready_o == (f_held != 2'd2));
    if (f_tracked) begin
      assert (f_ahead < f_held);
      assert ((f_ahead == '0 ? data_q : spare_q) == f_beat);
      if (f_pop && f_ahead == '0) assert (data_o == f_beat);
    end
  end
end

logic [2:0] f_run;
logic f_was_full;
always_ff @(posedge clk_i) begin
  f_run      <= rst_i || !(f_push && f_pop) ? '0 : f_run + 3'(f_run != '1);
  f_was_full <= !rst_i && (f_was_full || !ready_o);
  if (f_started && !rst_i && !$past(rst_i) && $past(valid_o && !ready_i)) begin
    assert (valid_o && $stable(data_o));
  end
  cover (f_run == 3'd4);
  cover (f_was_full && !valid_o);
end
