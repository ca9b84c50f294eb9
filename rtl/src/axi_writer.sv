// SPDX-License-Identifier: Apache-2.0
// Writes rows to memory over AXI4. A command names an address, aligned to a beat, and how many beats follow; the stream's
// frame of that many beats, with last at the end, goes there. A command of no beats takes none.
//
// Bursts are incrementing, at most BurstBeats long and end where a multiple of BurstBeats beats ends, so none crosses 4 KiB.
// A burst is announced once all of it is in the store, so a slow producer never holds the bus.
//
// A frame that ends early sets short_frame_o; the rest is written with no byte enabled. One that goes on sets long_frame_o;
// what is too much, up to and with last, is dropped. An error response sets bus_error_o. idle_o: every command's beats were
// answered by memory. All transactions carry one id. Reset forgets what is under way: memory must be reset with it.
`default_nettype none

module axi_writer #(
    parameter int unsigned DataBits = 256,
    parameter int unsigned AddrBits = 40,
    parameter int unsigned LenBits = 24,
    parameter int unsigned Depth = 32,  // beats; a power of two, two bursts for full throughput
    parameter int unsigned Bursts = 16,  // not answered yet, at most; a power of two
    parameter int unsigned BurstBeats = 16  // a power of two
) (
    input  wire logic                  clk_i,
    input  wire logic                  rst_i,
    input  wire logic                  cmd_valid_i,
    output logic                       cmd_ready_o,
    input  wire logic [  AddrBits-1:0] cmd_addr_i,
    input  wire logic [   LenBits-1:0] cmd_beats_i,
    input  wire logic                  in_valid_i,
    output logic                       in_ready_o,
    input  wire logic [  DataBits-1:0] in_data_i,
    input  wire logic                  in_last_i,
    output logic                       idle_o,
    // sticky
    output logic                       short_frame_o,
    output logic                       long_frame_o,
    output logic                       bus_error_o,
    // AXI4, one id
    output logic      [  AddrBits-1:0] m_axi_awaddr,
    output logic      [           7:0] m_axi_awlen,
    output logic      [           2:0] m_axi_awsize,
    output logic      [           1:0] m_axi_awburst,
    output logic                       m_axi_awvalid,
    input  wire logic                  m_axi_awready,
    output logic      [  DataBits-1:0] m_axi_wdata,
    output logic      [DataBits/8-1:0] m_axi_wstrb,
    output logic                       m_axi_wlast,
    output logic                       m_axi_wvalid,
    input  wire logic                  m_axi_wready,
    input  wire logic [           1:0] m_axi_bresp,
    input  wire logic                  m_axi_bvalid,
    output logic                       m_axi_bready
);

  localparam int unsigned ByteBits = $clog2(DataBits / 8);
  localparam int unsigned BeatBits = AddrBits - ByteBits;
  localparam int unsigned BurstBits = $clog2(BurstBeats);
  localparam int unsigned CountBits = $clog2(Bursts + 1);

  if (DataBits < 16 || (DataBits & (DataBits - 1)) != 0) begin : gen_illegal_width
    $error("axi_writer: %0d bits of data; a power of two of at least 16 is needed", DataBits);
  end
  if (BurstBeats < 2 || (BurstBeats & (BurstBeats - 1)) != 0 || BurstBeats > 256 || BurstBeats * DataBits > 4096 * 8)
  begin : gen_illegal_burst
    $error("axi_writer: bursts of %0d beats of %0d bits; a power of two of at least 2, at most 256 and 4 KiB is needed",
           BurstBeats, DataBits);
  end
  if (Depth < BurstBeats) begin : gen_illegal_depth
    $error("axi_writer: a store of %0d beats; at least the %0d of a burst are needed", Depth, BurstBeats);
  end

  // --- the command's beats, be there as many in the frame or not
  logic [BeatBits-1:0] beat_q;
  logic [BurstBits-1:0] first_q;  // of this burst, within the BurstBeats that it may end with
  logic [LenBits-1:0] left_q;
  logic active, padding_q, swallowing_q, open, step, final_beat, boundary;
  logic store_ready, address_ready;
  logic [CountBits-1:0] pending_q, whole_q;  // bursts without an answer; bursts that W owes

  assign active      = left_q != '0;
  assign cmd_ready_o = !active && !swallowing_q;
  assign open        = active && store_ready && address_ready && pending_q != CountBits'(Bursts);
  assign in_ready_o  = swallowing_q || (open && !padding_q);
  assign step        = open && (padding_q || in_valid_i);
  assign final_beat  = left_q == LenBits'(1);
  assign boundary    = final_beat || beat_q[BurstBits-1:0] == '1;
  assign idle_o      = !active && !swallowing_q && pending_q == '0;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      left_q        <= '0;
      padding_q     <= 1'b0;
      swallowing_q  <= 1'b0;
      short_frame_o <= 1'b0;
      long_frame_o  <= 1'b0;
    end else begin
      if (cmd_valid_i && cmd_ready_o) left_q <= cmd_beats_i;
      if (step) begin
        left_q <= left_q - 1'b1;
        if (final_beat) padding_q <= 1'b0;
        else if (!padding_q && in_last_i) begin
          padding_q     <= 1'b1;
          short_frame_o <= 1'b1;
        end
        if (final_beat && !padding_q && !in_last_i) begin
          swallowing_q <= 1'b1;
          long_frame_o <= 1'b1;
        end
      end
      if (swallowing_q && in_valid_i && in_last_i) swallowing_q <= 1'b0;
    end
  end

  always_ff @(posedge clk_i) begin
    if (cmd_valid_i && cmd_ready_o) begin
      beat_q  <= cmd_addr_i[AddrBits-1:ByteBits];
      first_q <= cmd_addr_i[ByteBits+:BurstBits];
    end else if (step) begin
      beat_q <= beat_q + 1'b1;
      if (boundary) first_q <= '0;
    end
  end

  logic [ByteBits-1:0] unused_bytes;
  assign unused_bytes = cmd_addr_i[ByteBits-1:0];

  // --- addresses and data of whole bursts
  logic [BeatBits-1:0] address;
  logic [BurstBits-1:0] length;
  logic [2:0] unused_addresses;
  logic [$clog2(Depth+1)-1:0] unused_beats;
  logic store_valid, enabled, sent, answered;

  fifo #(
      .Width(BeatBits + BurstBits),
      .Depth(4)
  ) u_addresses (
      .clk_i,
      .rst_i,
      .valid_i(step && boundary),
      .ready_o(address_ready),
      .data_i ({beat_q[BeatBits-1:BurstBits], first_q, beat_q[BurstBits-1:0] - first_q}),
      .valid_o(m_axi_awvalid),
      .ready_i(m_axi_awready),
      .data_o ({address, length}),
      .count_o(unused_addresses)
  );

  assign m_axi_awaddr  = {address, {ByteBits{1'b0}}};
  assign m_axi_awlen   = 8'(length);
  assign m_axi_awsize  = 3'(ByteBits);
  assign m_axi_awburst = 2'b01;

  fifo #(
      .Width(DataBits + 2),
      .Depth(Depth)
  ) u_store (
      .clk_i,
      .rst_i,
      .valid_i(step),
      .ready_o(store_ready),
      .data_i ({boundary, !padding_q, in_data_i}),
      .valid_o(store_valid),
      .ready_i(m_axi_wready && m_axi_wvalid),
      .data_o ({m_axi_wlast, enabled, m_axi_wdata}),
      .count_o(unused_beats)
  );

  assign m_axi_wvalid = store_valid && whole_q != '0;
  assign m_axi_wstrb  = {DataBits / 8{enabled}};
  assign m_axi_bready = 1'b1;
  assign sent         = m_axi_wvalid && m_axi_wready && m_axi_wlast;
  assign answered     = m_axi_bvalid && pending_q != '0;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      pending_q   <= '0;
      whole_q     <= '0;
      bus_error_o <= 1'b0;
    end else begin
      pending_q <= pending_q + CountBits'(step && boundary) - CountBits'(answered);
      whole_q   <= whole_q + CountBits'(step && boundary) - CountBits'(sent);
      if (m_axi_bvalid && m_axi_bresp != 2'b00) bus_error_o <= 1'b1;
    end
  end

endmodule

`default_nettype wire
