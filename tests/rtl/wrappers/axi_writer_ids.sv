// SPDX-License-Identifier: Apache-2.0
// axi_writer with the transaction ids that the bench's memory asks for.
`default_nettype none

module axi_writer_ids #(
    parameter int unsigned DataBits = 256,
    parameter int unsigned AddrBits = 40,
    parameter int unsigned LenBits = 24,
    parameter int unsigned Depth = 32,
    parameter int unsigned Bursts = 16,
    parameter int unsigned BurstBeats = 16
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
    output logic                       short_frame_o,
    output logic                       long_frame_o,
    output logic                       bus_error_o,
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
    output logic                       m_axi_bready,
    output logic                     m_axi_awid,
    input  wire logic                m_axi_bid
);

  assign m_axi_awid = '0;
  logic unused_id;
  assign unused_id = m_axi_bid;

  axi_writer #(
      .DataBits(DataBits),
      .AddrBits(AddrBits),
      .LenBits(LenBits),
      .Depth(Depth),
      .Bursts(Bursts),
      .BurstBeats(BurstBeats)
  ) u_dut (
      .*
  );

endmodule

`default_nettype wire
