// SPDX-License-Identifier: Apache-2.0
// Reads runs of beats from memory over AXI4. A command names an address, aligned to a beat, and how many beats follow; the
// stream gives them in order, with last at the command's last beat. A command of no beats gives none.
//
// Bursts are incrementing, at most BurstBeats long and end where a multiple of BurstBeats beats ends, so none crosses 4 KiB.
// A burst is only asked for when the store has room for all of it: R never waits, and up to Depth beats or Bursts bursts are
// under way. A command takes two cycles at least; longer ones follow each other without a gap in the data.
//
// An error response, or a burst that ends too early or too late, sets bus_error_o; the data that came is passed on. All
// transactions carry one id, so the answers come in order. Reset forgets what is under way: memory must be reset with it.
`default_nettype none

module axi_reader #(
    parameter int unsigned DataBits = 256,
    parameter int unsigned AddrBits = 40,
    parameter int unsigned LenBits = 24,
    parameter int unsigned Depth = 64,  // beats; a power of two: this over the memory's latency is the throughput
    parameter int unsigned Bursts = 16,  // a power of two
    parameter int unsigned BurstBeats = 16  // a power of two
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                cmd_valid_i,
    output logic                     cmd_ready_o,
    input  wire logic [AddrBits-1:0] cmd_addr_i,
    input  wire logic [ LenBits-1:0] cmd_beats_i,
    output logic                     out_valid_o,
    input  wire logic                out_ready_i,
    output logic      [DataBits-1:0] out_data_o,
    output logic                     out_last_o,
    // sticky
    output logic                     bus_error_o,
    // AXI4, one id
    output logic      [AddrBits-1:0] m_axi_araddr,
    output logic      [         7:0] m_axi_arlen,
    output logic      [         2:0] m_axi_arsize,
    output logic      [         1:0] m_axi_arburst,
    output logic                     m_axi_arvalid,
    input  wire logic                m_axi_arready,
    input  wire logic [DataBits-1:0] m_axi_rdata,
    input  wire logic [         1:0] m_axi_rresp,
    input  wire logic                m_axi_rlast,
    input  wire logic                m_axi_rvalid,
    output logic                     m_axi_rready
);

  localparam int unsigned ByteBits = $clog2(DataBits / 8);
  localparam int unsigned BeatBits = AddrBits - ByteBits;
  localparam int unsigned BurstBits = $clog2(BurstBeats);
  localparam int unsigned RoomBits = $clog2(Depth + 1);

  if (DataBits < 16 || (DataBits & (DataBits - 1)) != 0) begin : gen_illegal_width
    $error("axi_reader: %0d bits of data; a power of two of at least 16 is needed", DataBits);
  end
  if (BurstBeats < 2 || (BurstBeats & (BurstBeats - 1)) != 0 || BurstBeats > 256 || BurstBeats * DataBits > 4096 * 8)
  begin : gen_illegal_burst
    $error("axi_reader: bursts of %0d beats of %0d bits; a power of two of at least 2, at most 256 and 4 KiB is needed",
           BurstBeats, DataBits);
  end
  if (Depth < BurstBeats) begin : gen_illegal_depth
    $error("axi_reader: a store of %0d beats; at least the %0d of a burst are needed", Depth, BurstBeats);
  end
  if (LenBits < BurstBits + 1) begin : gen_illegal_length
    $error("axi_reader: lengths of %0d bits; %0d at least are needed", LenBits, BurstBits + 1);
  end

  // --- bursts of the command
  logic [BeatBits-1:0] beat_q;
  logic [LenBits-1:0] left_q;
  logic [RoomBits-1:0] room_q;
  logic [BurstBits:0] to_edge, beats;
  logic issue, pop, final_burst, tag_ready, address_valid_q;
  logic [BeatBits-1:0] address_q;
  logic [BurstBits-1:0] length, length_q;

  assign cmd_ready_o = left_q == '0;
  assign to_edge     = (BurstBits + 1)'(BurstBeats) - {1'b0, beat_q[BurstBits-1:0]};
  assign final_burst = left_q <= LenBits'(to_edge);
  assign beats       = final_burst ? (BurstBits + 1)'(left_q) : to_edge;
  assign length      = BurstBits'(beats - 1'b1);
  assign issue       = left_q != '0 && room_q >= RoomBits'(beats) && tag_ready && (!address_valid_q || m_axi_arready);

  assign m_axi_araddr  = {address_q, {ByteBits{1'b0}}};
  assign m_axi_arlen   = 8'(length_q);
  assign m_axi_arsize  = 3'(ByteBits);
  assign m_axi_arburst = 2'b01;
  assign m_axi_arvalid = address_valid_q;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      left_q          <= '0;
      room_q          <= RoomBits'(Depth);
      address_valid_q <= 1'b0;
    end else begin
      if (cmd_valid_i && cmd_ready_o) left_q <= cmd_beats_i;
      else if (issue) left_q <= left_q - LenBits'(beats);
      room_q <= room_q - (issue ? RoomBits'(beats) : '0) + RoomBits'(pop);
      if (issue) address_valid_q <= 1'b1;
      else if (m_axi_arready) address_valid_q <= 1'b0;
    end
  end

  always_ff @(posedge clk_i) begin
    if (cmd_valid_i && cmd_ready_o) beat_q <= cmd_addr_i[AddrBits-1:ByteBits];
    else if (issue) beat_q <= beat_q + BeatBits'(beats);
    if (issue) begin
      address_q <= beat_q;
      length_q  <= length;
    end
  end

  logic [ByteBits-1:0] unused_bytes;
  assign unused_bytes = cmd_addr_i[ByteBits-1:0];

  // --- what the answers belong to
  logic tag_valid, tag_final, take, ending, store_ready;
  logic [BurstBits-1:0] tag_length, place_q;
  logic [$clog2(Bursts+1)-1:0] unused_tags;
  logic [RoomBits-1:0] unused_beats;

  fifo #(
      .Width(BurstBits + 1),
      .Depth(Bursts)
  ) u_tags (
      .clk_i,
      .rst_i,
      .valid_i(issue),
      .ready_o(tag_ready),
      .data_i ({final_burst, length}),
      .valid_o(tag_valid),
      .ready_i(take && ending),
      .data_o ({tag_final, tag_length}),
      .count_o(unused_tags)
  );

  assign m_axi_rready = store_ready && tag_valid;
  assign take         = m_axi_rvalid && m_axi_rready;
  assign ending       = place_q == tag_length;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      place_q     <= '0;
      bus_error_o <= 1'b0;
    end else if (take) begin
      place_q <= ending ? '0 : place_q + 1'b1;
      if (m_axi_rresp != 2'b00 || m_axi_rlast != ending) bus_error_o <= 1'b1;
    end
  end

  assign pop = out_valid_o && out_ready_i;

  fifo #(
      .Width(DataBits + 1),
      .Depth(Depth)
  ) u_store (
      .clk_i,
      .rst_i,
      .valid_i(take),
      .ready_o(store_ready),
      .data_i ({ending && tag_final, m_axi_rdata}),
      .valid_o(out_valid_o),
      .ready_i(out_ready_i),
      .data_o ({out_last_o, out_data_o}),
      .count_o(unused_beats)
  );

endmodule

`default_nettype wire
