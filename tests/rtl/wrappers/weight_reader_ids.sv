// SPDX-License-Identifier: Apache-2.0
// weight_reader with the transaction ids that the bench's memory asks for.
`default_nettype none

module weight_reader_ids #(
    parameter int unsigned DataBits = 256,
    parameter int unsigned AddrBits = 40,
    parameter int unsigned LenBits = 24,
    parameter int unsigned Depth = 64,
    localparam int unsigned OutBits = 768
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                cmd_valid_i,
    output logic                     cmd_ready_o,
    input  wire logic [AddrBits-1:0] cmd_addr_i,
    input  wire logic [ LenBits-1:0] cmd_beats_i,
    output logic                     out_valid_o,
    input  wire logic                out_ready_i,
    output logic      [ OutBits-1:0] out_data_o,
    output logic                     bus_error_o,
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
    output logic                     m_axi_w2_rready,
    output logic                     m_axi_w0_arid,
    input  wire logic                m_axi_w0_rid,
    output logic                     m_axi_w1_arid,
    input  wire logic                m_axi_w1_rid,
    output logic                     m_axi_w2_arid,
    input  wire logic                m_axi_w2_rid
);

  assign m_axi_w0_arid = '0;
  assign m_axi_w1_arid = '0;
  assign m_axi_w2_arid = '0;
  logic [2:0] unused_ids;
  assign unused_ids = {m_axi_w0_rid, m_axi_w1_rid, m_axi_w2_rid};

  weight_reader #(
      .DataBits(DataBits),
      .AddrBits(AddrBits),
      .LenBits(LenBits),
      .Depth(Depth)
  ) u_dut (
      .*
  );

endmodule

`default_nettype wire
