// SPDX-License-Identifier: Apache-2.0
// The port that rows go over: one reader for what a run is fed with, descriptors among it, one for rows beside the sums, so that
// neither waits for what the other's user has no room for yet; one writer.
`default_nettype none

module row_port #(
    parameter int unsigned Lanes = 16,
    parameter int unsigned AddrBits = 40,
    parameter int unsigned LenBits = 24,
    localparam int unsigned DataBits = 16 * Lanes
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                source_cmd_valid_i,
    output logic                     source_cmd_ready_o,
    input  wire logic [AddrBits-1:0] source_cmd_addr_i,
    input  wire logic [ LenBits-1:0] source_cmd_beats_i,
    output logic                     source_valid_o,
    input  wire logic                source_ready_i,
    output logic      [DataBits-1:0] source_data_o,
    output logic                     source_last_o,
    input  wire logic                side_cmd_valid_i,
    output logic                     side_cmd_ready_o,
    input  wire logic [AddrBits-1:0] side_cmd_addr_i,
    input  wire logic [ LenBits-1:0] side_cmd_beats_i,
    output logic                     side_valid_o,
    input  wire logic                side_ready_i,
    output logic      [DataBits-1:0] side_data_o,
    input  wire logic                target_cmd_valid_i,
    output logic                     target_cmd_ready_o,
    input  wire logic [AddrBits-1:0] target_cmd_addr_i,
    input  wire logic [ LenBits-1:0] target_cmd_beats_i,
    input  wire logic                target_valid_i,
    output logic                     target_ready_o,
    input  wire logic [DataBits-1:0] target_data_i,
    input  wire logic                target_last_i,
    output logic                     target_idle_o,  // all that was written has been answered
    // sticky
    output logic                     short_frame_o,
    output logic                     long_frame_o,
    output logic                     bus_error_o,
    output logic      [AddrBits-1:0] m_axi_x_araddr,
    output logic      [         7:0] m_axi_x_arlen,
    output logic      [         2:0] m_axi_x_arsize,
    output logic      [         1:0] m_axi_x_arburst,
    output logic                     m_axi_x_arvalid,
    input  wire logic                m_axi_x_arready,
    input  wire logic [DataBits-1:0] m_axi_x_rdata,
    input  wire logic [         1:0] m_axi_x_rresp,
    input  wire logic                m_axi_x_rlast,
    input  wire logic                m_axi_x_rvalid,
    output logic                     m_axi_x_rready,
    output logic      [AddrBits-1:0] m_axi_x_awaddr,
    output logic      [         7:0] m_axi_x_awlen,
    output logic      [         2:0] m_axi_x_awsize,
    output logic      [         1:0] m_axi_x_awburst,
    output logic                     m_axi_x_awvalid,
    input  wire logic                m_axi_x_awready,
    output logic      [DataBits-1:0] m_axi_x_wdata,
    output logic      [ 2*Lanes-1:0] m_axi_x_wstrb,
    output logic                     m_axi_x_wlast,
    output logic                     m_axi_x_wvalid,
    input  wire logic                m_axi_x_wready,
    input  wire logic [         1:0] m_axi_x_bresp,
    input  wire logic                m_axi_x_bvalid,
    output logic                     m_axi_x_bready
);

  logic [2*AddrBits-1:0] araddr;
  logic [15:0] arlen;
  logic [5:0] arsize;
  logic [3:0] arburst;
  logic [1:0] arvalid, arready, rvalid, rready, read_error;
  logic write_error, unused_side_last;

  axi_reader #(
      .DataBits(DataBits),
      .AddrBits(AddrBits),
      .LenBits (LenBits)
  ) u_source (
      .clk_i,
      .rst_i,
      .cmd_valid_i  (source_cmd_valid_i),
      .cmd_ready_o  (source_cmd_ready_o),
      .cmd_addr_i   (source_cmd_addr_i),
      .cmd_beats_i  (source_cmd_beats_i),
      .out_valid_o  (source_valid_o),
      .out_ready_i  (source_ready_i),
      .out_data_o   (source_data_o),
      .out_last_o   (source_last_o),
      .bus_error_o  (read_error[0]),
      .m_axi_araddr (araddr[AddrBits-1:0]),
      .m_axi_arlen  (arlen[7:0]),
      .m_axi_arsize (arsize[2:0]),
      .m_axi_arburst(arburst[1:0]),
      .m_axi_arvalid(arvalid[0]),
      .m_axi_arready(arready[0]),
      .m_axi_rdata  (m_axi_x_rdata),
      .m_axi_rresp  (m_axi_x_rresp),
      .m_axi_rlast  (m_axi_x_rlast),
      .m_axi_rvalid (rvalid[0]),
      .m_axi_rready (rready[0])
  );

  axi_reader #(
      .DataBits(DataBits),
      .AddrBits(AddrBits),
      .LenBits (LenBits)
  ) u_side (
      .clk_i,
      .rst_i,
      .cmd_valid_i  (side_cmd_valid_i),
      .cmd_ready_o  (side_cmd_ready_o),
      .cmd_addr_i   (side_cmd_addr_i),
      .cmd_beats_i  (side_cmd_beats_i),
      .out_valid_o  (side_valid_o),
      .out_ready_i  (side_ready_i),
      .out_data_o   (side_data_o),
      .out_last_o   (unused_side_last),
      .bus_error_o  (read_error[1]),
      .m_axi_araddr (araddr[2*AddrBits-1:AddrBits]),
      .m_axi_arlen  (arlen[15:8]),
      .m_axi_arsize (arsize[5:3]),
      .m_axi_arburst(arburst[3:2]),
      .m_axi_arvalid(arvalid[1]),
      .m_axi_arready(arready[1]),
      .m_axi_rdata  (m_axi_x_rdata),
      .m_axi_rresp  (m_axi_x_rresp),
      .m_axi_rlast  (m_axi_x_rlast),
      .m_axi_rvalid (rvalid[1]),
      .m_axi_rready (rready[1])
  );

  axi_read_arbiter #(
      .AddrBits(AddrBits)
  ) u_arbiter (
      .clk_i,
      .rst_i,
      .s_axi_araddr (araddr),
      .s_axi_arlen  (arlen),
      .s_axi_arvalid(arvalid),
      .s_axi_arready(arready),
      .s_axi_rvalid (rvalid),
      .s_axi_rready (rready),
      .m_axi_araddr (m_axi_x_araddr),
      .m_axi_arlen  (m_axi_x_arlen),
      .m_axi_arvalid(m_axi_x_arvalid),
      .m_axi_arready(m_axi_x_arready),
      .m_axi_rlast  (m_axi_x_rlast),
      .m_axi_rvalid (m_axi_x_rvalid),
      .m_axi_rready (m_axi_x_rready)
  );
  assign m_axi_x_arsize  = arsize[2:0];
  assign m_axi_x_arburst = arburst[1:0];

  axi_writer #(
      .DataBits(DataBits),
      .AddrBits(AddrBits),
      .LenBits (LenBits)
  ) u_target (
      .clk_i,
      .rst_i,
      .cmd_valid_i  (target_cmd_valid_i),
      .cmd_ready_o  (target_cmd_ready_o),
      .cmd_addr_i   (target_cmd_addr_i),
      .cmd_beats_i  (target_cmd_beats_i),
      .in_valid_i   (target_valid_i),
      .in_ready_o   (target_ready_o),
      .in_data_i    (target_data_i),
      .in_last_i    (target_last_i),
      .idle_o       (target_idle_o),
      .short_frame_o,
      .long_frame_o,
      .bus_error_o  (write_error),
      .m_axi_awaddr  (m_axi_x_awaddr),
      .m_axi_awlen   (m_axi_x_awlen),
      .m_axi_awsize  (m_axi_x_awsize),
      .m_axi_awburst (m_axi_x_awburst),
      .m_axi_awvalid (m_axi_x_awvalid),
      .m_axi_awready (m_axi_x_awready),
      .m_axi_wdata   (m_axi_x_wdata),
      .m_axi_wstrb   (m_axi_x_wstrb),
      .m_axi_wlast   (m_axi_x_wlast),
      .m_axi_wvalid  (m_axi_x_wvalid),
      .m_axi_wready  (m_axi_x_wready),
      .m_axi_bresp   (m_axi_x_bresp),
      .m_axi_bvalid  (m_axi_x_bvalid),
      .m_axi_bready  (m_axi_x_bready)
  );

  assign bus_error_o = read_error != '0 || write_error;

endmodule

`default_nettype wire
