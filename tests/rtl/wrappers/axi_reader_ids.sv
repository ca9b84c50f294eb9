// SPDX-License-Identifier: Apache-2.0
// axi_reader with the transaction ids that the bench's memory asks for.
`default_nettype none

module axi_reader_ids #(
    parameter int unsigned DataBits = 256,
    parameter int unsigned AddrBits = 40,
    parameter int unsigned LenBits = 24,
    parameter int unsigned Depth = 64,
    parameter int unsigned Bursts = 16,
    parameter int unsigned BurstBeats = 16
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
    output logic                     bus_error_o,
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
    output logic                     m_axi_rready,
    output logic                     m_axi_arid,
    input  wire logic                m_axi_rid
);

  assign m_axi_arid = '0;
  logic unused_id;
  assign unused_id = m_axi_rid;

  axi_reader #(
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
