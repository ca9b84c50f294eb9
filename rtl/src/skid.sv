// SPDX-License-Identifier: Apache-2.0
// Two-entry register slice: full throughput, and no combinational path from one side to the other.
`default_nettype none

module skid #(
    parameter int unsigned Width = 8
) (
    input  wire logic             clk_i,
    input  wire logic             rst_i,
    input  wire logic             valid_i,
    output logic                  ready_o,
    input  wire logic [Width-1:0] data_i,
    output logic                  valid_o,
    input  wire logic             ready_i,
    output logic      [Width-1:0] data_o
);

  logic [Width-1:0] data_q, spare_q;
  logic valid_q, spare_valid_q;

  assign ready_o = !spare_valid_q;
  assign valid_o = valid_q;
  assign data_o  = data_q;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      valid_q       <= 1'b0;
      spare_valid_q <= 1'b0;
    end else if (ready_i || !valid_q) begin
      valid_q       <= valid_i || spare_valid_q;
      spare_valid_q <= 1'b0;
    end else if (valid_i) begin
      spare_valid_q <= 1'b1;
    end
  end

  // Data carries no reset, so that it may sit in any primitive.
  always_ff @(posedge clk_i) begin
    if (ready_i || !valid_q) data_q <= spare_valid_q ? spare_q : data_i;
    if (ready_o) spare_q <= data_i;
  end

endmodule

`default_nettype wire
