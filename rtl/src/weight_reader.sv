// SPDX-License-Identifier: Apache-2.0
// Reads the weight stream: contiguous 768-bit beats, over three read ports at once. Memory is cut into pieces of 16 port
// beats at multiples of 16 port beats, one burst each; a command's pieces go to the ports in turn, its first one to port 0,
// and are put together again in their order. A command of no beats gives none.
//
// Each port gathers quads of four of its beats, so that the pieces can be taken three port beats a cycle, as fast as the
// ports deliver them: a 768-bit beat every DataBits * 3 / 768 cycles. Whole aligned quads are read, up to three port beats
// more than asked for at either end of the command, never out of the 4 KiB that the command's own bytes lie in.
`default_nettype none

module weight_reader #(
    parameter int unsigned DataBits = 256,  // of a port: 64, 128 or 256
    parameter int unsigned AddrBits = 40,
    parameter int unsigned LenBits = 24,
    parameter int unsigned Depth = 64,  // port beats under way a port, a power of two
    localparam int unsigned OutBits = 768
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    // address, aligned to a port beat, and count of 768-bit beats
    input  wire logic                cmd_valid_i,
    output logic                     cmd_ready_o,
    input  wire logic [AddrBits-1:0] cmd_addr_i,
    input  wire logic [ LenBits-1:0] cmd_beats_i,
    output logic                     out_valid_o,
    input  wire logic                out_ready_i,
    output logic      [ OutBits-1:0] out_data_o,
    // sticky
    output logic                     bus_error_o,
    // AXI4, one id each
    output logic      [AddrBits-1:0] m_axi_w0_araddr,
    output logic      [         7:0] m_axi_w0_arlen,
    output logic      [         2:0] m_axi_w0_arsize,
    output logic      [         1:0] m_axi_w0_arburst,
    output logic                     m_axi_w0_arvalid,
    input  wire logic                m_axi_w0_arready,
    input  wire logic [DataBits-1:0] m_axi_w0_rdata,
    input  wire logic [         1:0] m_axi_w0_rresp,
    input  wire logic                m_axi_w0_rlast,
    input  wire logic                m_axi_w0_rvalid,
    output logic                     m_axi_w0_rready,
    output logic      [AddrBits-1:0] m_axi_w1_araddr,
    output logic      [         7:0] m_axi_w1_arlen,
    output logic      [         2:0] m_axi_w1_arsize,
    output logic      [         1:0] m_axi_w1_arburst,
    output logic                     m_axi_w1_arvalid,
    input  wire logic                m_axi_w1_arready,
    input  wire logic [DataBits-1:0] m_axi_w1_rdata,
    input  wire logic [         1:0] m_axi_w1_rresp,
    input  wire logic                m_axi_w1_rlast,
    input  wire logic                m_axi_w1_rvalid,
    output logic                     m_axi_w1_rready,
    output logic      [AddrBits-1:0] m_axi_w2_araddr,
    output logic      [         7:0] m_axi_w2_arlen,
    output logic      [         2:0] m_axi_w2_arsize,
    output logic      [         1:0] m_axi_w2_arburst,
    output logic                     m_axi_w2_arvalid,
    input  wire logic                m_axi_w2_arready,
    input  wire logic [DataBits-1:0] m_axi_w2_rdata,
    input  wire logic [         1:0] m_axi_w2_rresp,
    input  wire logic                m_axi_w2_rlast,
    input  wire logic                m_axi_w2_rvalid,
    output logic                     m_axi_w2_rready
);

  localparam int unsigned Ports = 3;
  localparam int unsigned PortBeats = OutBits / DataBits;  // of a 768-bit beat
  localparam int unsigned ByteBits = $clog2(DataBits / 8);
  localparam int unsigned QuadBits = 4 * DataBits;
  localparam int unsigned QuadAddrBits = AddrBits - ByteBits - 2;
  localparam int unsigned CountBits = LenBits + 4;  // of port beats

  if (DataBits != 64 && DataBits != 128 && DataBits != 256) begin : gen_illegal_width
    $error("weight_reader: ports of %0d bits; 64, 128 or 256 are needed", DataBits);
  end

  function automatic logic [1:0] after(input logic [1:0] port);
    after = port == 2'(Ports - 1) ? 2'd0 : port + 2'd1;
  endfunction

  // One vector a signal over the ports.
  logic [Ports-1:0][AddrBits-1:0] araddr;
  logic [Ports-1:0][7:0] arlen;
  logic [Ports-1:0][2:0] arsize;
  logic [Ports-1:0][1:0] arburst, rresp;
  logic [Ports-1:0][DataBits-1:0] rdata;
  logic [Ports-1:0] arvalid, arready, rlast, rvalid, rready;

  assign {m_axi_w2_araddr, m_axi_w1_araddr, m_axi_w0_araddr}    = araddr;
  assign {m_axi_w2_arlen, m_axi_w1_arlen, m_axi_w0_arlen}       = arlen;
  assign {m_axi_w2_arsize, m_axi_w1_arsize, m_axi_w0_arsize}    = arsize;
  assign {m_axi_w2_arburst, m_axi_w1_arburst, m_axi_w0_arburst} = arburst;
  assign {m_axi_w2_arvalid, m_axi_w1_arvalid, m_axi_w0_arvalid} = arvalid;
  assign {m_axi_w2_rready, m_axi_w1_rready, m_axi_w0_rready}    = rready;
  assign arready = {m_axi_w2_arready, m_axi_w1_arready, m_axi_w0_arready};
  assign rdata   = {m_axi_w2_rdata, m_axi_w1_rdata, m_axi_w0_rdata};
  assign rresp   = {m_axi_w2_rresp, m_axi_w1_rresp, m_axi_w0_rresp};
  assign rlast   = {m_axi_w2_rlast, m_axi_w1_rlast, m_axi_w0_rlast};
  assign rvalid  = {m_axi_w2_rvalid, m_axi_w1_rvalid, m_axi_w0_rvalid};

  // --- a command's pieces, to the ports in turn
  logic [QuadAddrBits-1:0] quad_q;
  logic [CountBits-1:0] left_q, lanes;
  logic [1:0] port_q, skip;
  logic [2:0] to_edge, quads;
  logic [Ports-1:0] piece_valid, piece_ready;
  logic take, step, join_ready;

  // Port beats that the command spans, from its first quad's first one on.
  assign skip        = cmd_addr_i[ByteBits+:2];
  assign lanes       = CountBits'(cmd_beats_i) * CountBits'(PortBeats) + CountBits'(skip);
  assign cmd_ready_o = left_q == '0 && join_ready;
  assign take        = cmd_valid_i && cmd_ready_o && cmd_beats_i != '0;
  assign to_edge     = 3'd4 - {1'b0, quad_q[1:0]};
  assign quads       = left_q < CountBits'(to_edge) ? 3'(left_q) : to_edge;
  assign step        = (piece_valid & piece_ready) != '0;

  always_comb begin
    for (int unsigned port = 0; port < Ports; port++) begin
      piece_valid[port] = left_q != '0 && 32'(port_q) == port;
    end
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) left_q <= '0;
    else if (take) left_q <= (lanes + CountBits'(3)) >> 2;
    else if (step) left_q <= left_q - CountBits'(quads);
  end

  always_ff @(posedge clk_i) begin
    if (take) begin
      quad_q <= cmd_addr_i[AddrBits-1:ByteBits+2];
      port_q <= '0;
    end else if (step) begin
      quad_q <= quad_q + QuadAddrBits'(quads);
      port_q <= after(port_q);
    end
  end

  logic [ByteBits-1:0] unused_bytes;
  assign unused_bytes = cmd_addr_i[ByteBits-1:0];

  // --- ports
  logic [Ports-1:0] error, quad_valid, quad_ready;
  logic [Ports-1:0][QuadBits-1:0] quad_data;

  for (genvar port = 0; port < Ports; port++) begin : gen_port
    logic beat_valid, beat_ready, whole_valid, whole_ready, unused_beat_last, unused_whole_last;
    logic [DataBits-1:0] beat;
    logic [QuadBits-1:0] whole;
    logic [3:0] unused_quads;

    axi_reader #(
        .DataBits(DataBits),
        .AddrBits(AddrBits),
        .LenBits (5),
        .Depth   (Depth)
    ) u_reader (
        .clk_i,
        .rst_i,
        .cmd_valid_i  (piece_valid[port]),
        .cmd_ready_o  (piece_ready[port]),
        .cmd_addr_i   ({quad_q, {ByteBits + 2{1'b0}}}),
        .cmd_beats_i  ({quads, 2'b00}),
        .out_valid_o  (beat_valid),
        .out_ready_i  (beat_ready),
        .out_data_o   (beat),
        .out_last_o   (unused_beat_last),
        .bus_error_o  (error[port]),
        .m_axi_araddr (araddr[port]),
        .m_axi_arlen  (arlen[port]),
        .m_axi_arsize (arsize[port]),
        .m_axi_arburst(arburst[port]),
        .m_axi_arvalid(arvalid[port]),
        .m_axi_arready(arready[port]),
        .m_axi_rdata  (rdata[port]),
        .m_axi_rresp  (rresp[port]),
        .m_axi_rlast  (rlast[port]),
        .m_axi_rvalid (rvalid[port]),
        .m_axi_rready (rready[port])
    );

    gearbox #(
        .Width(DataBits),
        .In   (1),
        .Out  (4)
    ) u_quad (
        .clk_i,
        .rst_i,
        .in_valid_i (beat_valid),
        .in_ready_o (beat_ready),
        .in_data_i  (beat),
        .in_lanes_i (1'b1),
        .in_last_i  (1'b0),
        .out_valid_o(whole_valid),
        .out_ready_i(whole_ready),
        .out_data_o (whole),
        .out_last_o (unused_whole_last)
    );

    // Two pieces: one is taken in as many cycles as a third of it needs to come.
    fifo #(
        .Width(QuadBits),
        .Depth(8)
    ) u_quads (
        .clk_i,
        .rst_i,
        .valid_i(whole_valid),
        .ready_o(whole_ready),
        .data_i (whole),
        .valid_o(quad_valid[port]),
        .ready_i(quad_ready[port]),
        .data_o (quad_data[port]),
        .count_o(unused_quads)
    );
  end

  assign bus_error_o = error != '0;

  // --- together again: commands wait here in their order
  logic join_valid, load, start_q, joining_q, pop, give, group_valid, group_ready, final_group;
  logic [1:0] join_skip, join_place, place_q, kept_q, turn_q, unused_joins;
  logic [CountBits-1:0] join_groups, groups_q;

  fifo #(
      .Width(CountBits + 4),
      .Depth(2)
  ) u_join (
      .clk_i,
      .rst_i,
      .valid_i(take),
      .ready_o(join_ready),
      .data_i ({CountBits'(cmd_beats_i) * CountBits'(PortBeats / 3), skip, cmd_addr_i[ByteBits+2+:2]}),
      .valid_o(join_valid),
      .ready_i(load),
      .data_o ({join_groups, join_skip, join_place}),
      .count_o(unused_joins)
  );

  // Three lanes leave a cycle. kept_q lanes of the quad before are waiting; with three of them no quad is needed. At the
  // start of a command that begins inside its quad, that quad's last lanes become the first ones kept.
  logic [2:0][DataBits-1:0] keep_q, group;
  logic [3:0][DataBits-1:0] quad;

  assign quad        = quad_data[turn_q];
  assign load        = join_valid && !joining_q;
  assign group_valid = joining_q && !start_q && (kept_q == 2'd3 || quad_valid[turn_q]);
  assign give        = group_valid && group_ready;
  assign final_group = groups_q == CountBits'(1);
  assign pop         = joining_q && quad_valid[turn_q] && (start_q || (group_ready && kept_q != 2'd3));

  always_comb begin
    quad_ready         = '0;
    quad_ready[turn_q] = pop;
    unique case (kept_q)
      2'd0: group = quad[2:0];
      2'd1: group = {quad[1:0], keep_q[0]};
      2'd2: group = {quad[0], keep_q[1:0]};
      default: group = keep_q;
    endcase
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) joining_q <= 1'b0;
    else if (load) joining_q <= 1'b1;
    else if (give && final_group) joining_q <= 1'b0;
  end

  always_ff @(posedge clk_i) begin
    if (load) begin
      groups_q <= join_groups;
      start_q  <= join_skip != '0;
      kept_q   <= 2'd0 - join_skip;
      place_q  <= join_place;
      turn_q   <= '0;
    end else begin
      if (give) groups_q <= groups_q - 1'b1;
      if (give) kept_q <= kept_q + 2'd1;
      if (pop) begin
        start_q <= 1'b0;
        place_q <= place_q + 2'd1;
        if (place_q == 2'd3) turn_q <= after(turn_q);
      end
    end
    if (pop) begin
      unique case (start_q ? kept_q : kept_q + 2'd1)
        2'd1: keep_q[0] <= quad[3];
        2'd2: keep_q[1:0] <= quad[3:2];
        default: keep_q <= quad[3:1];
      endcase
    end
  end

  logic unused_last;
  gearbox #(
      .Width(3 * DataBits),
      .In   (1),
      .Out  (PortBeats / 3)
  ) u_out (
      .clk_i,
      .rst_i,
      .in_valid_i (group_valid),
      .in_ready_o (group_ready),
      .in_data_i  (group),
      .in_lanes_i (1'b1),
      .in_last_i  (1'b0),
      .out_valid_o,
      .out_ready_i,
      .out_data_o,
      .out_last_o (unused_last)
  );

endmodule

`default_nettype wire
