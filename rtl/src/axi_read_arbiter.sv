// SPDX-License-Identifier: Apache-2.0
// Two readers on one AXI4 read port: addresses take turns, answers go back in the order of their addresses. The readers only
// ask for what they have room for, so that neither ever holds the other up.
`default_nettype none

module axi_read_arbiter #(
    parameter int unsigned AddrBits = 40,
    parameter int unsigned Bursts = 32  // under way; a power of two
) (
    input  wire logic                  clk_i,
    input  wire logic                  rst_i,
    input  wire logic [2*AddrBits-1:0] s_axi_araddr,
    input  wire logic [          15:0] s_axi_arlen,
    input  wire logic [           1:0] s_axi_arvalid,
    output logic      [           1:0] s_axi_arready,
    output logic      [           1:0] s_axi_rvalid,
    input  wire logic [           1:0] s_axi_rready,
    output logic      [  AddrBits-1:0] m_axi_araddr,
    output logic      [           7:0] m_axi_arlen,
    output logic                       m_axi_arvalid,
    input  wire logic                  m_axi_arready,
    input  wire logic                  m_axi_rlast,
    input  wire logic                  m_axi_rvalid,
    output logic                       m_axi_rready
);

  // An address that is offered stays: whose it is may only change when it has been taken.
  logic turn_q, held_q, chosen, order_ready, order_valid, owner;
  logic [$clog2(Bursts+1)-1:0] unused_count;

  assign chosen        = held_q ? turn_q : (s_axi_arvalid[turn_q] ? turn_q : !turn_q);
  assign m_axi_arvalid = s_axi_arvalid[chosen] && order_ready;
  assign m_axi_araddr  = chosen ? s_axi_araddr[2*AddrBits-1:AddrBits] : s_axi_araddr[AddrBits-1:0];
  assign m_axi_arlen   = chosen ? s_axi_arlen[15:8] : s_axi_arlen[7:0];
  assign s_axi_arready = {chosen, !chosen} & {2{m_axi_arready && order_ready}};

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      turn_q <= 1'b0;
      held_q <= 1'b0;
    end else if (m_axi_arvalid) begin
      turn_q <= m_axi_arready ? !chosen : chosen;
      held_q <= !m_axi_arready;
    end
  end

  fifo #(
      .Width(1),
      .Depth(Bursts)
  ) u_order (
      .clk_i,
      .rst_i,
      .valid_i(m_axi_arvalid && m_axi_arready),
      .ready_o(order_ready),
      .data_i (chosen),
      .valid_o(order_valid),
      .ready_i(m_axi_rvalid && m_axi_rready && m_axi_rlast),
      .data_o (owner),
      .count_o(unused_count)
  );

  assign s_axi_rvalid = {owner, !owner} & {2{m_axi_rvalid && order_valid}};
  assign m_axi_rready = order_valid && s_axi_rready[owner];


endmodule

`default_nettype wire
