// SPDX-License-Identifier: Apache-2.0
// axi_reader: bursts keep within a block of BurstBeats beats and so within 4 KiB, follow each other without gap or overlap
// and add up to the command; an address that is offered stays; no more is asked for than the store has room for, so R never
// waits; every beat asked for is taken once. Order within the buffers is the fifo's proof. Bursts is 2 here.
logic f_started = 1'b0;
always_ff @(posedge clk_i) f_started <= 1'b1;

// Registers of the buffers.
logic [BurstBits:0] f_tag0;  // = u_tags.store[0]
logic [BurstBits:0] f_tag1;  // = u_tags.store[1]
logic f_tag_read;  // = u_tags.read_q
logic f_tag_write;  // = u_tags.write_q

// Beats asked for by issue that have not come; those of them whose address memory has taken.
logic [RoomBits-1:0] f_due, f_asked;
// Of the command: beats, and those asked for.
logic [LenBits-1:0] f_beats, f_issued;
logic [BeatBits-1:0] f_next;
logic [BurstBits:0] f_waiting;
assign f_waiting = m_axi_arvalid ? (BurstBits + 1)'(m_axi_arlen) + 1'b1 : '0;

always_comb begin
  if (!f_started) assume (rst_i);
  // Memory answers what it was asked.
  assume (!m_axi_rvalid || f_asked != '0);
end

always_ff @(posedge clk_i) begin
  if (rst_i) begin
    f_due    <= '0;
    f_asked  <= '0;
    f_beats  <= '0;
    f_issued <= '0;
  end else begin
    f_due   <= f_due + (issue ? RoomBits'(beats) : '0) - RoomBits'(take);
    f_asked <= f_asked + (m_axi_arvalid && m_axi_arready ? RoomBits'(f_waiting) : '0) - RoomBits'(take);
    if (cmd_valid_i && cmd_ready_o) begin
      f_beats  <= cmd_beats_i;
      f_issued <= '0;
      f_next   <= cmd_addr_i[AddrBits-1:ByteBits];
    end else if (issue) begin
      f_issued <= f_issued + LenBits'(beats);
      f_next   <= f_next + BeatBits'(beats);
    end
  end
end

logic [BurstBits:0] f_first, f_second;
assign f_first  = (BurstBits + 1)'(BurstBits'(f_tag_read ? f_tag1 : f_tag0)) + 1'b1;
assign f_second = (BurstBits + 1)'(BurstBits'(f_tag_read ? f_tag0 : f_tag1)) + 1'b1;

always_comb begin
  if (f_started && !rst_i) begin
    assert (32'(room_q) + 32'(unused_beats) + 32'(f_due) == Depth);
    assert (32'(unused_tags) <= 2 && f_tag_write == (f_tag_read ^ unused_tags[0]));
    assert (32'(f_due) + 32'(place_q)
            == (unused_tags != '0 ? 32'(f_first) : 0) + (unused_tags == 2 ? 32'(f_second) : 0));
    assert (32'(f_due) == 32'(f_asked) + 32'(f_waiting));
    assert (tag_valid ? place_q <= tag_length : place_q == '0);
    if (m_axi_rvalid) assert (m_axi_rready);

    assert (32'(f_issued) + 32'(left_q) == 32'(f_beats));
    assert (left_q == '0 || beat_q == f_next);
    if (issue) assert (beats != '0 && 32'(beats) <= BurstBeats && final_burst == (left_q == LenBits'(beats)));
    if (m_axi_arvalid) begin
      assert (32'(m_axi_araddr[ByteBits+:BurstBits]) + 32'(m_axi_arlen) < BurstBeats);
      assert (32'(m_axi_araddr[11:0]) + (32'(m_axi_arlen) + 1) * DataBits / 8 <= 4096);
    end
  end
end

logic [2:0] f_run;
always_ff @(posedge clk_i) begin
  f_run <= rst_i || !(take && pop) ? '0 : f_run + 3'(f_run != '1);
  if (f_started && !rst_i && !$past(rst_i)) begin
    if ($past(m_axi_arvalid && !m_axi_arready)) begin
      assert (m_axi_arvalid && $stable(m_axi_araddr) && $stable(m_axi_arlen));
    end
    if ($past(issue)) assert (m_axi_arvalid && m_axi_araddr == {$past(f_next), {ByteBits{1'b0}}});
    if ($past(out_valid_o && !out_ready_i)) assert (out_valid_o);
    cover (f_run == 3'd4);
    cover ($past(out_valid_o && out_last_o && out_ready_i) && f_beats > LenBits'(BurstBeats) && !out_valid_o);
  end
end
