// SPDX-License-Identifier: Apache-2.0
// axi_writer: bursts keep within a block of BurstBeats beats and so within 4 KiB, follow each other without gap or overlap
// and add up to the command; an address that is offered stays, and so does data until its burst's end, be the producer as
// slow as it likes; a burst has as many beats as its address says; idle_o only when every burst was answered. Order within
// the buffers is the fifo's proof. Depth is 4 here.
logic f_started = 1'b0;
always_ff @(posedge clk_i) f_started <= 1'b1;

// Registers of the store.
logic [DataBits+1:0] f_beat0;  // = u_store.store[0]
logic [DataBits+1:0] f_beat1;  // = u_store.store[1]
logic [DataBits+1:0] f_beat2;  // = u_store.store[2]
logic [DataBits+1:0] f_beat3;  // = u_store.store[3]
logic [1:0] f_read;  // = u_store.read_q
logic [1:0] f_write;  // = u_store.write_q

logic [3:0] f_ends, f_inside;
assign f_ends   = {f_beat3[DataBits+1], f_beat2[DataBits+1], f_beat1[DataBits+1], f_beat0[DataBits+1]};
always_comb begin
  for (int unsigned place = 0; place < 4; place++) f_inside[place] = 32'(2'(place - 32'(f_read))) < 32'(unused_beats);
end

// Bursts announced by step and not answered, those whose data left; beats of the burst in hand; of the command.
logic [CountBits-1:0] f_open, f_left;
logic [BurstBits:0] f_length;
logic [LenBits-1:0] f_beats, f_stepped;
logic [BeatBits-1:0] f_start;

always_comb begin
  if (!f_started) assume (rst_i);
  // Memory answers bursts that it has, once.
  assume (!m_axi_bvalid || f_left != '0);
end

always_ff @(posedge clk_i) begin
  if (rst_i) begin
    f_open    <= '0;
    f_left    <= '0;
    f_length  <= '0;
    f_beats   <= '0;
    f_stepped <= '0;
  end else begin
    f_open <= f_open + CountBits'(step && boundary) - CountBits'(m_axi_bvalid && m_axi_bready);
    f_left <= f_left + CountBits'(sent) - CountBits'(m_axi_bvalid && m_axi_bready);
    if (step) f_length <= boundary ? '0 : f_length + 1'b1;
    if (cmd_valid_i && cmd_ready_o) begin
      f_beats   <= cmd_beats_i;
      f_stepped <= '0;
      f_start   <= cmd_addr_i[AddrBits-1:ByteBits];
    end else if (step) f_stepped <= f_stepped + 1'b1;
  end
end

always_comb begin
  if (f_started && !rst_i) begin
    assert (f_open == pending_q && 32'(f_open) <= Bursts);
    assert (32'(f_open) == 32'(f_left) + 32'(whole_q));
    assert (idle_o == (f_open == '0 && f_stepped == f_beats && !swallowing_q));
    assert (32'(unused_beats) <= 4 && f_write == 2'(32'(f_read) + 32'(unused_beats)));
    assert (32'(whole_q) == $countones(f_ends & f_inside));
    // The newest beat ends a burst, or is of the burst in hand.
    assert (unused_beats == '0 || f_ends[2'(f_write - 1'b1)] == (f_length == '0));

    assert (32'(f_stepped) + 32'(left_q) == 32'(f_beats));
    assert (!active || beat_q == f_start + BeatBits'(f_stepped));
    assert (active || f_length == '0);
    assert (!active || beat_q[BurstBits-1:0] == BurstBits'(first_q + BurstBits'(f_length)));
    assert (!active || 32'(first_q) + 32'(f_length) < BurstBeats);
    assert (32'(f_length) <= 32'(f_stepped));
    // What u_addresses is given: the first beat of the burst and one less than how many.
    if (step && boundary) begin
      assert ({beat_q[BeatBits-1:BurstBits], first_q} == f_start + BeatBits'(f_stepped) - BeatBits'(f_length));
      assert (32'(BurstBits'(beat_q[BurstBits-1:0] - first_q)) == 32'(f_length));
      assert (32'(first_q) + 32'(f_length) < BurstBeats);
    end
    assert (32'(unused_addresses) <= 4);
    assert (!step || (store_ready && address_ready));
    assert (!sent || whole_q != '0);
  end
end

logic [2:0] f_run;
always_ff @(posedge clk_i) begin
  f_run <= rst_i || !(step && m_axi_wvalid && m_axi_wready) ? '0 : f_run + 3'(f_run != '1);
  if (f_started && !rst_i && !$past(rst_i)) begin
    if ($past(m_axi_awvalid && !m_axi_awready)) assert (m_axi_awvalid);
    if ($past(m_axi_wvalid && !m_axi_wready)) assert (m_axi_wvalid);
    if ($past(m_axi_wvalid && m_axi_wready && !m_axi_wlast)) assert (m_axi_wvalid);
    cover (f_run == 3'd3);
    cover ($past(!idle_o) && idle_o && f_beats > LenBits'(BurstBeats));
    cover ($past(!idle_o) && idle_o && short_frame_o && long_frame_o);
  end
end
