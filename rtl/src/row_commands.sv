// SPDX-License-Identifier: Apache-2.0
// Commands for rows of a buffer, one stride apart: as many as gate_i allows so far, rows_i in all.
`default_nettype none

module row_commands #(
    parameter int unsigned AddrBits = 40,
    parameter int unsigned RowBits = 16
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                start_i,
    input  wire logic [AddrBits-1:0] base_i,
    input  wire logic [AddrBits-1:0] stride_i,  // two's complement
    input  wire logic [ RowBits-1:0] rows_i,
    input  wire logic [ RowBits-1:0] gate_i,
    output logic                     done_o,
    output logic                     cmd_valid_o,
    input  wire logic                cmd_ready_i,
    output logic      [AddrBits-1:0] cmd_addr_o
);

  logic [RowBits-1:0] issued_q, rows_q;
  logic [AddrBits-1:0] addr_q, stride_q;

  assign done_o      = issued_q == rows_q;
  assign cmd_valid_o = !done_o && issued_q < gate_i;
  assign cmd_addr_o  = addr_q;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      issued_q <= '0;
      rows_q   <= '0;
    end else if (start_i) begin
      issued_q <= '0;
      rows_q   <= rows_i;
    end else if (cmd_valid_o && cmd_ready_i) begin
      issued_q <= issued_q + 1'b1;
    end
  end

  always_ff @(posedge clk_i) begin
    if (start_i) begin
      addr_q   <= base_i;
      stride_q <= stride_i;
    end else if (cmd_valid_o && cmd_ready_i) begin
      addr_q <= addr_q + stride_q;
    end
  end

endmodule

`default_nettype wire
