// SPDX-License-Identifier: Apache-2.0
// Sum of 2^Depth signed numbers. Every level is one bit wider than the one below, so nothing overflows; a register
// follows every RegisterEvery-th level from the leaves: latency Depth / RegisterEvery cycles, one sum a cycle.
`default_nettype none

module adder_tree #(
    parameter int unsigned Depth = 3,
    parameter int unsigned Width = 10,
    parameter int unsigned RegisterEvery = 2,
    localparam int unsigned Terms = 1 << Depth
) (
    input  wire logic                           clk_i,
    input  wire logic        [Terms*Width-1:0]  terms_i,
    output logic signed      [Width+Depth-1:0]  sum_o
);

  if (Depth == 0) begin : gen_leaf
    assign sum_o = terms_i;
    // A leaf has no register; the clock is the siblings'.
    wire logic unused_clk = clk_i;
  end else begin : gen_node
    localparam int unsigned Half = Terms / 2 * Width;
    logic signed [Width+Depth-2:0] low, high;
    logic signed [Width+Depth-1:0] sum;

    adder_tree #(
        .Depth(Depth - 1),
        .Width(Width),
        .RegisterEvery(RegisterEvery)
    ) u_low (
        .clk_i,
        .terms_i(terms_i[Half-1:0]),
        .sum_o  (low)
    );
    adder_tree #(
        .Depth(Depth - 1),
        .Width(Width),
        .RegisterEvery(RegisterEvery)
    ) u_high (
        .clk_i,
        .terms_i(terms_i[2*Half-1:Half]),
        .sum_o  (high)
    );

    assign sum = (Width + Depth)'(low) + (Width + Depth)'(high);

    if (Depth % RegisterEvery == 0) begin : gen_register
      logic signed [Width+Depth-1:0] sum_q;
      always_ff @(posedge clk_i) sum_q <= sum;
      assign sum_o = sum_q;
    end else begin : gen_through
      assign sum_o = sum;
    end
  end

endmodule

`default_nettype wire
