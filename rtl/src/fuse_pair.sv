// SPDX-License-Identifier: Apache-2.0
// What follows the dequantizer, for two neighbouring lanes: nothing, the residual's addition, rotation of the pair, or a
// gate's map times this. y is finite and comes from half_pack; side is a float16, for the rotation a cosine and a sine of
// 14 bits behind the point. Latency registers, all moved by enable_i.
//
// Every mode is a * b + c * d + e with one rounding:
//   bypass        my * 1                                          (ey)
//   residual      e = both mantissas at the lower exponent        11 + 29 bits and a carry: 41
//   rope          a0 C - a1 S, a1 C + a0 S                        26 + 15 bits and a carry: 42
//   silu          (mg mu) sigma                                   22 + 17 bits
//   squared ReLU  (mg mu) max(mg, 0)                              22 + 11 bits
// so 44 bits with a sign hold each.
`default_nettype none

module fuse_pair
(
    input  wire logic        clk_i,
    input  wire logic        enable_i,
    input  wire logic [ 2:0] mode_i,
    input  wire logic [31:0] y_i,
    input  wire logic [31:0] side_i,
    output logic      [31:0] out_o,
    output logic             nonfinite_o,  // of side_i, at once
    output logic             saturated_o   // of out_o
);

  // --- 1: fields
  typedef logic signed [11:0] mantissa_t;
  typedef logic signed [7:0] exponent_t;

  function automatic mantissa_t signed_mantissa(input logic [15:0] half);
    mantissa_t magnitude;
    magnitude       = mantissa_t'(half_pkg::mantissa(half_pkg::finite(half[14:0])));
    signed_mantissa = half[15] ? -magnitude : magnitude;
  endfunction

  function automatic exponent_t wide_exponent(input logic [15:0] half);
    wide_exponent = exponent_t'(half_pkg::exponent(half_pkg::finite(half[14:0])));
  endfunction

  // |g| in units of 2^-14, at most 2^18 - 1
  function automatic logic [17:0] sigmoid_place(input logic [15:0] half);
    logic signed [7:0] shift;
    logic [29:0] wide;
    logic [10:0] mantissa;
    mantissa = half_pkg::mantissa(half_pkg::finite(half[14:0]));
    shift    = wide_exponent(half) + 8'sd14;
    wide     = shift < 8'sd0 ? 30'(mantissa) >> (-shift) : 30'(mantissa) << shift;
    sigmoid_place = wide > 30'h3ffff ? 18'h3ffff : 18'(wide);
  endfunction

  assign nonfinite_o = (mode_i == fuse_pkg::Residual || mode_i == fuse_pkg::Silu || mode_i == fuse_pkg::SquaredRelu)
                       && (half_pkg::nonfinite(side_i[14:0]) || half_pkg::nonfinite(side_i[30:16]));

  logic [2:0] mode_q, mode_q2, mode_q3;
  logic [17:0] place0_q, place1_q;
  logic [16:0] sigma0, sigma1;
  exponent_t top_q;

  // A table's place is read one register ahead: the sum of RAM and interpolation is there with stage 3.
  sigmoid_rom u_sigmoid (
      .clk_i,
      .enable_i,
      .z0_i    (place0_q),
      .z1_i    (place1_q),
      .sigma0_o(sigma0),
      .sigma1_o(sigma1)
  );

  mantissa_t my_q[2], ms_q[2], ms_q2[2], ms_q3[2];
  exponent_t ey_q[2], es_q[2];
  logic [31:0] side_q, side_q2, side_q3;

  always_ff @(posedge clk_i) begin
    if (enable_i) begin
      mode_q   <= mode_i;
      mode_q2  <= mode_q;
      mode_q3  <= mode_q2;
      side_q   <= side_i;
      side_q2  <= side_q;
      side_q3  <= side_q2;
      place0_q <= sigmoid_place(side_i[15:0]);
      place1_q <= sigmoid_place(side_i[31:16]);
      top_q    <= wide_exponent(y_i[15:0]) > wide_exponent(y_i[31:16]) ? wide_exponent(y_i[15:0]) : wide_exponent(y_i[31:16]);
      for (int lane = 0; lane < 2; lane++) begin
        my_q[lane]  <= signed_mantissa(y_i[lane*16+:16]);
        ey_q[lane]  <= wide_exponent(y_i[lane*16+:16]);
        ms_q[lane]  <= signed_mantissa(side_i[lane*16+:16]);
        es_q[lane]  <= wide_exponent(side_i[lane*16+:16]);
        ms_q2[lane] <= ms_q[lane];
        ms_q3[lane] <= ms_q2[lane];
      end
    end
  end

  // --- 2: products of mantissas, the pair at one exponent, the residual's sum; 3 waits for the sigmoid
  logic signed [26:0] rotated_q[2], rotated_q2[2];
  logic signed [23:0] product_q[2], product_q2[2];
  logic signed [43:0] sum_q[2], sum_q2[2];
  exponent_t exponent_q2[2], exponent_q3[2];
  mantissa_t my_q2[2], my_q3[2];

  for (genvar lane = 0; lane < 2; lane++) begin : gen_second
    exponent_t low, exponent;
    logic signed [43:0] sum;
    logic signed [26:0] rotated;
    logic [25:0] magnitude;

    always_comb begin
      low = ey_q[lane] < es_q[lane] ? ey_q[lane] : es_q[lane];
      sum = (44'(my_q[lane]) <<< (ey_q[lane] - low)) + (44'(ms_q[lane]) <<< (es_q[lane] - low));

      magnitude = 26'(unsigned'(my_q[lane] < 12'sd0 ? -my_q[lane] : my_q[lane])) << 15;
      magnitude = magnitude >> (top_q - ey_q[lane]);
      rotated   = my_q[lane] < 12'sd0 ? -(27'(magnitude)) : 27'(magnitude);

      case (mode_q)
        fuse_pkg::Residual:    exponent = low;
        fuse_pkg::Rope:        exponent = top_q - 8'sd29;
        fuse_pkg::Silu:        exponent = es_q[lane] + ey_q[lane] - 8'sd16;
        fuse_pkg::SquaredRelu: exponent = es_q[lane] + es_q[lane] + ey_q[lane];
        default:     exponent = ey_q[lane];
      endcase
    end

    always_ff @(posedge clk_i) begin
      if (enable_i) begin
        sum_q[lane]       <= mode_q == fuse_pkg::Residual ? sum : '0;
        rotated_q[lane]   <= rotated;
        product_q[lane]   <= my_q[lane] * ms_q[lane];
        exponent_q2[lane] <= exponent;
        my_q2[lane]       <= my_q[lane];
        sum_q2[lane]      <= sum_q[lane];
        rotated_q2[lane]  <= rotated_q[lane];
        product_q2[lane]  <= product_q[lane];
        exponent_q3[lane] <= exponent_q2[lane];
        my_q3[lane]       <= my_q2[lane];
      end
    end
  end

  // --- 4: factors; 5: their products; 6: the sum; then rounding
  for (genvar lane = 0; lane < 2; lane++) begin : gen_fourth
    logic signed [26:0] a, a_q, c_q;
    logic signed [17:0] b, b_q, d, d_q, sigma;
    logic signed [44:0] first_q, second_q;
    logic signed [43:0] sum_q4, sum_q5, value_q;
    exponent_t exponent_q4, exponent_q5, exponent_q6;
    logic signed [15:0] cosine, sine;

    assign cosine = signed'(side_q3[15:0]);
    assign sine   = signed'(side_q3[31:16]);

    always_comb begin
      sigma = 18'(unsigned'(lane == 0 ? sigma0 : sigma1));
      if (ms_q3[lane] < 12'sd0) sigma = 18'sd65536 - sigma;
      a = '0;
      b = '0;
      d = '0;
      case (mode_q3)
        fuse_pkg::Bypass: begin
          a = 27'(my_q3[lane]);
          b = 18'sd1;
        end
        fuse_pkg::Rope: begin
          a = rotated_q2[lane];
          b = 18'(cosine);
          d = lane == 0 ? -(18'(sine)) : 18'(sine);
        end
        fuse_pkg::Silu: begin
          a = 27'(product_q2[lane]);
          b = sigma;
        end
        fuse_pkg::SquaredRelu: begin
          a = 27'(product_q2[lane]);
          b = ms_q3[lane] > 12'sd0 ? 18'(ms_q3[lane]) : '0;
        end
        default: ;
      endcase
    end

    always_ff @(posedge clk_i) begin
      if (enable_i) begin
        a_q         <= a;
        b_q         <= b;
        c_q         <= rotated_q2[1-lane];
        d_q         <= d;
        sum_q4      <= sum_q2[lane];
        exponent_q4 <= exponent_q3[lane];

        first_q     <= a_q * b_q;
        second_q    <= c_q * d_q;
        sum_q5      <= sum_q4;
        exponent_q5 <= exponent_q4;

        value_q     <= 44'(first_q + second_q) + sum_q5;
        exponent_q6 <= exponent_q5;
      end
    end

    half_pack #(
        .Width(44),
        .ExponentBits(8)
    ) u_round (
        .clk_i,
        .enable_i,
        .value_i    (value_q),
        .exponent_i (exponent_q6),
        .half_o     (out_o[lane*16+:16]),
        .saturated_o(saturated[lane])
    );
  end

  logic [1:0] saturated;
  assign saturated_o = saturated != '0;

endmodule

`default_nettype wire
