// SPDX-License-Identifier: Apache-2.0
// Method 1 of the look-up: no table. Each of T*G weights, two bits, takes its activation, its negative or nothing, and all
// are added. Negatives are complements; the ones that they lack are counted in a tree of their own.
`default_nettype none

module study_select #(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    localparam int unsigned Inputs = T * G,
    localparam int unsigned Depth = $clog2(Inputs)
) (
    input  wire logic                    clk_i,
    input  wire logic   [  Inputs*8-1:0] block_i,
    input  wire logic   [  Inputs*2-1:0] weights_i,  // {taken, negative} each
    output logic signed [   Depth+8-1:0] sum_o
);

  logic [(1<<Depth)*8-1:0] terms;
  logic [(1<<Depth)*2-1:0] ones;
  logic signed [Depth+7:0] sum;
  logic signed [Depth+1:0] negatives;

  always_comb begin
    terms = '0;
    ones  = '0;
    for (int unsigned i = 0; i < Inputs; i++) begin
      if (weights_i[2*i+1]) terms[i*8+:8] = block_i[i*8+:8] ^ {8{weights_i[2*i]}};
      ones[2*i] = weights_i[2*i+1] && weights_i[2*i];
    end
  end

  adder_tree #(
      .Depth(Depth),
      .Width(8)
  ) u_tree (
      .clk_i,
      .terms_i(terms),
      .sum_o  (sum)
  );

  adder_tree #(
      .Depth(Depth),
      .Width(2)
  ) u_ones (
      .clk_i,
      .terms_i(ones),
      .sum_o  (negatives)
  );

  assign sum_o = sum + (Depth + 8)'(negatives);

endmodule

`default_nettype wire
