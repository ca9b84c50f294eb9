// SPDX-License-Identifier: Apache-2.0
// A row's factor: its scale s times the matrix's constant, 17 bits, to the nearest, ties to even. Two registers after start_i.
//
// The product of 11 and 17 bits has at most 28; shorter ones than 17 only come from a scale of zero, which gives zero.
`default_nettype none

module row_factor (
    input  wire logic              clk_i,
    input  wire logic              start_i,
    input  wire logic       [14:0] scale_i,
    input  wire logic       [16:0] mantissa_i,
    input  wire logic signed [7:0] exponent_i,
    output logic            [16:0] mantissa_o,
    output logic signed     [ 8:0] exponent_o
);

  logic [27:0] product_q;
  logic signed [8:0] exponent_q;

  // --- the first place that is kept, and the rounding there
  logic [3:0] shift;
  logic [17:0] kept;
  logic guard, sticky;

  always_comb begin
    shift = '0;
    for (int unsigned place = 17; place < 28; place++) begin
      if (product_q[place]) shift = 4'(place - 16);
    end
    guard  = shift != '0 && 1'(product_q >> (shift - 4'd1));
    sticky = shift > 4'd1 && (product_q & ~({28{1'b1}} << (shift - 4'd1))) != '0;
    kept   = 18'(product_q >> shift);
    kept   = kept + 18'(guard && (sticky || kept[0]));
  end

  always_ff @(posedge clk_i) begin
    if (start_i) begin
      product_q  <= half_pkg::mantissa(scale_i) * mantissa_i;
      exponent_q <= 9'(half_pkg::exponent(scale_i)) + 9'(exponent_i);
    end
    // A carry leaves a power of two.
    mantissa_o <= kept[17] ? 17'h10000 : kept[16:0];
    exponent_o <= exponent_q + 9'(shift) + 9'(kept[17]);
  end

endmodule

`default_nettype wire
