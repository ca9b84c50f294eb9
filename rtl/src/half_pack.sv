// SPDX-License-Identifier: Apache-2.0
// value * 2^exponent rounded once to float16: nearest, ties to even, subnormals kept, clamped at 65504; zero is +0.
// Three registers, all moved by enable_i.
`default_nettype none

module half_pack #(
    parameter int unsigned Width = 39,  // bits of value, signed
    parameter int unsigned ExponentBits = 8
) (
    input  wire logic                            clk_i,
    input  wire logic                            enable_i,
    input  wire logic signed [       Width-1:0]  value_i,
    input  wire logic signed [ExponentBits-1:0]  exponent_i,
    output logic             [             15:0] half_o,
    output logic                                 saturated_o
);

  localparam int unsigned LengthBits = $clog2(Width + 1);
  // wide enough for length - 11 + exponent and its distance from any place
  localparam int unsigned PlaceBits = (ExponentBits > LengthBits ? ExponentBits : LengthBits) + 3;

  if (Width < 12) begin : gen_illegal_width
    $error("half_pack: Width %0d; at least 12 bits are needed", Width);
  end

  // --- 1: magnitude and its length
  logic sign_q;
  logic [Width-1:0] magnitude, magnitude_q;
  logic [LengthBits-1:0] length, length_q;
  logic signed [ExponentBits-1:0] exponent_q;

  assign magnitude = value_i[Width-1] ? Width'(-value_i) : Width'(value_i);

  always_comb begin
    length = '0;
    for (int unsigned place = 0; place < Width; place++) begin
      if (magnitude[place]) length = LengthBits'(place + 1);
    end
  end

  // --- 2: the place of the last bit kept, and what is cut off there
  logic sign_q2;
  logic signed [PlaceBits-1:0] natural, place, shift, place_q;
  logic [10:0] kept, kept_q;
  logic guard, sticky, guard_q, sticky_q;
  logic [Width-1:0] below;

  always_comb begin
    natural = PlaceBits'(signed'({1'b0, length_q})) - PlaceBits'(11) + PlaceBits'(exponent_q);
    place   = natural < PlaceBits'(half_pkg::MinExponent) ? PlaceBits'(half_pkg::MinExponent) : natural;
    shift   = place - PlaceBits'(exponent_q);
    below   = '0;
    guard   = 1'b0;
    sticky  = 1'b0;
    if (shift > PlaceBits'(0)) begin
      // Beyond the width everything, the guard bit included, is zero but for what sticks.
      below  = shift > PlaceBits'(signed'({1'b0, LengthBits'(Width)})) ? Width'(1) << (Width - 1) : ~({Width{1'b1}} << (shift - PlaceBits'(1)));
      if (shift > PlaceBits'(signed'({1'b0, LengthBits'(Width)}))) begin
        sticky = magnitude_q != '0;
      end else begin
        sticky = (magnitude_q & below) != '0;
        guard  = 1'(magnitude_q >> (shift - PlaceBits'(1)));
      end
      kept = 11'(magnitude_q >> shift);
    end else begin
      kept = 11'(magnitude_q << (-shift));
    end
  end

  // --- 3: round; a carry out of the mantissa moves into the exponent field by itself
  logic [15:0] bits;
  logic over;

  always_comb begin
    bits = 16'(kept_q) + 16'(guard_q && (sticky_q || kept_q[0]));
    if (kept_q[10]) bits = bits + (16'(unsigned'(place_q + PlaceBits'(25))) << 10) - 16'd1024;
    over = kept_q[10] && (place_q > PlaceBits'(5) || bits > 16'(half_pkg::MaxBits));
    if (over) bits = 16'(half_pkg::MaxBits);
  end

  always_ff @(posedge clk_i) begin
    if (enable_i) begin
      sign_q      <= value_i[Width-1];
      magnitude_q <= magnitude;
      length_q    <= length;
      exponent_q  <= exponent_i;

      sign_q2  <= sign_q;
      place_q  <= place;
      kept_q   <= kept;
      guard_q  <= guard;
      sticky_q <= sticky;

      half_o      <= {sign_q2 && bits != '0, bits[14:0]};
      saturated_o <= over;
    end
  end

endmodule

`default_nettype wire
