// SPDX-License-Identifier: Apache-2.0
// gearbox: no lane is lost, doubled or moved; a frame's last beat is filled up with zeros; an offered beat stays; the store
// never overflows.
logic f_started = 1'b0;
always_ff @(posedge clk_i) f_started <= 1'b1;

localparam int unsigned OutBits = $clog2(Out + 1);
logic [OutBits-1:0] f_leaving;
logic [CountBits-1:0] f_held;
assign f_leaving = count_q < CountBits'(Out) ? OutBits'(count_q) : OutBits'(Out);

always_comb begin
  if (!f_started) assume (rst_i);
  assume (in_lanes_i >= 1 && in_lanes_i <= InBits'(In));
  if (!in_last_i) assume (in_lanes_i == InBits'(In));
end

// Any one lane that enters: what it was, and how many lanes leave before it.
(* anyseq *) logic f_pick;
(* anyseq *) logic [InBits-1:0] f_lane;
logic f_tracked;
logic [CountBits-1:0] f_ahead;
logic [Width-1:0] f_value;
always_comb assume (f_lane < in_lanes_i);

always_ff @(posedge clk_i) begin
  if (rst_i) begin
    f_held    <= '0;
    f_tracked <= 1'b0;
  end else begin
    f_held <= f_held + (push ? CountBits'(in_lanes_i) : '0) - (pop ? CountBits'(f_leaving) : '0);
    if (f_tracked && pop) begin
      f_ahead <= f_ahead - CountBits'(Out);
      if (f_ahead < CountBits'(Out)) f_tracked <= 1'b0;
    end
    if (!f_tracked && push && f_pick) begin
      f_tracked <= 1'b1;
      f_ahead   <= f_held - (pop ? CountBits'(f_leaving) : '0) + CountBits'(f_lane);
      f_value   <= in_data_i[f_lane*Width+:Width];
    end
  end
end

always_comb begin
  if (f_started && !rst_i) begin
    assert (count_q == f_held);
    assert (f_held <= CountBits'(Capacity));
    assert (ending_q || f_held % Step == 0);
    assert (!push || f_held <= CountBits'(Before));
    assert (!ending_q || f_held != '0);
    assert (!pop || out_last_o || f_held >= CountBits'(Out));
    assert (store_q >> (count_q * Width) == '0);
    if (f_tracked) begin
      assert (f_ahead < f_held);
      assert (Width'(store_q >> (f_ahead * Width)) == f_value);
      if (pop && f_ahead < CountBits'(Out)) assert (out_data_o[f_ahead*Width+:Width] == f_value);
    end
  end
end

logic [2:0] f_run;
logic f_was_full;
always_ff @(posedge clk_i) begin
  f_run      <= rst_i || !push || (In >= Out && !pop) ? '0 : f_run + 3'(f_run != '1);
  f_was_full <= !rst_i && (f_was_full || (!in_ready_o && !ending_q));
  if (f_started && !rst_i && !$past(rst_i) && $past(out_valid_o && !out_ready_i)) begin
    assert (out_valid_o && $stable(out_data_o) && (out_last_o || !$past(out_last_o)));
  end
  if (In <= Out) cover (f_run == 3'd4);
  cover (f_was_full && f_held == '0);
  cover (pop && out_last_o && f_leaving < OutBits'(Out));
end
