// SPDX-License-Identifier: Apache-2.0
// First-in first-out buffer in distributed RAM; what was pushed shows at the output one cycle later.
`default_nettype none

module fifo #(
    parameter int unsigned Width = 8,
    parameter int unsigned Depth = 16,  // a power of two
    localparam int unsigned CountBits = $clog2(Depth + 1)
) (
    input  wire logic                 clk_i,
    input  wire logic                 rst_i,
    input  wire logic                 valid_i,
    output logic                      ready_o,
    input  wire logic [    Width-1:0] data_i,
    output logic                      valid_o,
    input  wire logic                 ready_i,
    output logic      [    Width-1:0] data_o,
    output logic      [CountBits-1:0] count_o
);

  localparam int unsigned PlaceBits = Depth > 1 ? $clog2(Depth) : 1;

  if (Depth < 2 || (Depth & (Depth - 1)) != 0) begin : gen_illegal_depth
    $error("fifo: Depth %0d is no power of two of at least 2", Depth);
  end

  (* ram_style = "distributed" *)
  logic [Width-1:0] store[Depth];
  logic [PlaceBits-1:0] write_q, read_q;
  logic [CountBits-1:0] count_q;
  logic push, pop;

  assign push    = valid_i && ready_o;
  assign pop     = valid_o && ready_i;
  assign ready_o = count_q != CountBits'(Depth);
  assign valid_o = count_q != '0;
  assign data_o  = store[read_q];
  assign count_o = count_q;

  always_ff @(posedge clk_i) begin
    if (push) store[write_q] <= data_i;
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      write_q <= '0;
      read_q  <= '0;
      count_q <= '0;
    end else begin
      if (push) write_q <= write_q + 1'b1;
      if (pop) read_q <= read_q + 1'b1;
      if (push && !pop) count_q <= count_q + 1'b1;
      if (pop && !push) count_q <= count_q - 1'b1;
    end
  end

endmodule

`default_nettype wire
