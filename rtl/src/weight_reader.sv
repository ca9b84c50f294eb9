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

endmodule

`default_nettype wire
