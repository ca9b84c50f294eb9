// SPDX-License-Identifier: Apache-2.0
// fifo: nothing is lost, doubled or reordered; an offered beat stays; the count is what is inside, never above Depth.
logic f_started = 1'b0;
always_ff @(posedge clk_i) f_started <= 1'b1;
always_comb if (!f_started) assume (rst_i);

logic [CountBits-1:0] f_held;

// Any one beat that enters, wherever the solver likes: what it was, and how many leave before it.
(* anyseq *) logic f_pick;
logic f_tracked;
logic [CountBits-1:0] f_ahead;
logic [PlaceBits-1:0] f_place;
logic [Width-1:0] f_beat;
assign f_place = read_q + PlaceBits'(f_ahead);

always_ff @(posedge clk_i) begin
  if (rst_i) begin
    f_held    <= '0;
    f_tracked <= 1'b0;
  end else begin
    f_held <= f_held + CountBits'(valid_i && ready_o) - CountBits'(valid_o && ready_i);
    if (f_tracked && pop) begin
      f_ahead <= f_ahead - 1'b1;
      if (f_ahead == '0) f_tracked <= 1'b0;
    end
    if (!f_tracked && push && f_pick) begin
      f_tracked <= 1'b1;
      f_ahead   <= f_held - CountBits'(pop);
      f_beat    <= data_i;
    end
  end
end

always_comb begin
  if (f_started && !rst_i) begin
    assert (count_o == f_held);
    assert (f_held <= CountBits'(Depth));
    assert (PlaceBits'(write_q - read_q) == PlaceBits'(f_held));
    if (f_tracked) begin
      assert (f_ahead < f_held);
      assert (store[f_place] == f_beat);
      if (pop && f_ahead == '0) assert (data_o == f_beat);
    end
  end
end

logic [2:0] f_run;
logic f_was_full;
always_ff @(posedge clk_i) begin
  f_run      <= rst_i || !(push && pop) ? '0 : f_run + 3'(f_run != '1);
  f_was_full <= !rst_i && (f_was_full || !ready_o);
  if (f_started && !rst_i && !$past(rst_i) && $past(valid_o && !ready_i)) begin
    assert (valid_o && $stable(data_o));
  end
  cover (f_run == 3'd4);
  cover (f_was_full && !valid_o);
end
