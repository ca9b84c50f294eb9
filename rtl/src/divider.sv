// SPDX-License-Identifier: Apache-2.0
// Floor of a quotient of unsigned numbers, one bit a cycle (restoring). A divisor of zero gives all ones.
`default_nettype none

module divider #(
    parameter int unsigned DividendBits = 32,
    parameter int unsigned DivisorBits = 11
) (
    input  wire logic                    clk_i,
    input  wire logic                    rst_i,
    input  wire logic                    valid_i,
    output logic                         ready_o,
    input  wire logic [DividendBits-1:0] dividend_i,
    input  wire logic [ DivisorBits-1:0] divisor_i,
    output logic                         valid_o,
    input  wire logic                    ready_i,
    output logic      [DividendBits-1:0] quotient_o
);

  localparam int unsigned CountBits = $clog2(DividendBits + 1);

  logic [CountBits-1:0] left_q;
  logic valid_q;
  logic [DividendBits-1:0] dividend_q;  // what is left of it, and the quotient that takes its place from below
  logic [DivisorBits-1:0] divisor_q, remainder_q;
  logic [DivisorBits:0] next;
  logic fits;

  assign ready_o    = left_q == '0 && !valid_q;
  assign valid_o    = valid_q;
  assign quotient_o = dividend_q;
  assign next       = {remainder_q, dividend_q[DividendBits-1]};
  assign fits       = next >= {1'b0, divisor_q};

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      left_q  <= '0;
      valid_q <= 1'b0;
    end else begin
      if (valid_i && ready_o) left_q <= CountBits'(DividendBits);
      if (left_q != '0) left_q <= left_q - 1'b1;
      if (left_q == CountBits'(1)) valid_q <= 1'b1;
      if (valid_q && ready_i) valid_q <= 1'b0;
    end
  end

  always_ff @(posedge clk_i) begin
    if (valid_i && ready_o) begin
      dividend_q  <= dividend_i;
      divisor_q   <= divisor_i;
      remainder_q <= '0;
    end else if (left_q != '0) begin
      dividend_q  <= {dividend_q[DividendBits-2:0], fits};
      remainder_q <= fits ? DivisorBits'(next - {1'b0, divisor_q}) : DivisorBits'(next);
    end
  end

endmodule

`default_nettype wire
