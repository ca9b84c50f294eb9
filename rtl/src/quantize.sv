// SPDX-License-Identifier: Apache-2.0
// float16 rows to int8: 127 x / s rounded to nearest, ties to even, exactly; s is the row's largest magnitude, which comes
// first, at least 1e-5. One division a row (32 cycles), then a beat a cycle.
//
// R = ceil(127 * 2^24 / ms) is below 2^24, since ms >= 168; m * R below 2^35. For |x| <= s the rounded quotient is at most
// 127; a larger |x| gives 127 and clamped_o.
`default_nettype none

module quantize #(
    parameter int unsigned Lanes = 16
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    // bits of the row's largest magnitude
    input  wire logic                max_valid_i,
    output logic                     max_ready_o,
    input  wire logic [        14:0] max_data_i,
    // the row
    input  wire logic                in_valid_i,
    output logic                     in_ready_o,
    input  wire logic [Lanes*16-1:0] in_data_i,
    input  wire logic                in_last_i,
    // its scale s for the dequantizer, as bits of a float16, with the first beat
    output logic      [        14:0] scale_o,
    output logic                     out_valid_o,
    input  wire logic                out_ready_i,
    output logic      [ Lanes*8-1:0] out_data_o,
    output logic                     out_last_o,
    // sticky
    output logic                     clamped_o,
    output logic                     nonfinite_o
);

  localparam logic [14:0] MinScale = 15'h00a8;
  localparam int unsigned DividendBits = 31;

  // --- the row's reciprocal
  logic [14:0] scale_q;
  logic row_q, dividing, quotient_valid, quotient_ready, divide_ready;
  logic [DividendBits-1:0] quotient;
  logic [23:0] reciprocal_q;
  logic [14:0] scale;
  logic [10:0] divisor;
  logic drained;

  assign scale       = max_data_i < MinScale ? MinScale : max_data_i;
  assign divisor     = half_pkg::mantissa(scale);
  assign max_ready_o = divide_ready && !row_q && !dividing && drained;
  assign scale_o     = scale_q;

  divider #(
      .DividendBits(DividendBits),
      .DivisorBits(11)
  ) u_reciprocal (
      .clk_i,
      .rst_i,
      .valid_i   (max_valid_i && max_ready_o),
      .ready_o   (divide_ready),
      .dividend_i((DividendBits'(127) << 24) + DividendBits'(divisor) - DividendBits'(1)),
      .divisor_i (divisor),
      .valid_o   (quotient_valid),
      .ready_i   (quotient_ready),
      .quotient_o(quotient)
  );
  assign quotient_ready = 1'b1;

  logic advance, take;
  assign take       = in_valid_i && in_ready_o;
  assign in_ready_o = row_q && advance;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      row_q    <= 1'b0;
      dividing <= 1'b0;
    end else begin
      if (max_valid_i && max_ready_o) dividing <= 1'b1;
      if (quotient_valid) begin
        dividing <= 1'b0;
        row_q    <= 1'b1;
      end
      if (take && in_last_i) row_q <= 1'b0;
    end
  end

  always_ff @(posedge clk_i) begin
    if (max_valid_i && max_ready_o) scale_q <= scale;
    if (quotient_valid) reciprocal_q <= 24'(quotient);
  end

  // --- lanes: product, shift and round, sign; three registers that move together
  logic [2:0] valid_q, last_q;
  assign advance     = out_ready_i || !valid_q[2];
  assign out_valid_o = valid_q[2];
  assign out_last_o  = last_q[2];
  assign drained     = valid_q == '0;

  always_ff @(posedge clk_i) begin
    if (rst_i) valid_q <= '0;
    else if (advance) valid_q <= {valid_q[1:0], take};
    if (advance) last_q <= {last_q[1:0], in_last_i};
  end

  logic [Lanes-1:0] over, wild;

  for (genvar lane = 0; lane < Lanes; lane++) begin : gen_lane
    logic [14:0] magnitude;
    logic sign_q, sign_q2, over_q;
    logic [34:0] product_q;
    logic [5:0] shift, shift_q;
    logic [23:0] value, whole;
    logic guard, sticky;
    logic [7:0] rounded, rounded_q2;

    assign magnitude   = half_pkg::finite(in_data_i[lane*16+:15]);
    assign wild[lane]  = half_pkg::nonfinite(in_data_i[lane*16+:15]);
    assign over[lane]  = magnitude > scale_q;

    // 13 + es - e: negative only where |x| > s, which is clamped anyway
    always_comb begin
      logic signed [7:0] distance;
      distance = 8'sd13 + 8'(half_pkg::exponent(scale_q)) - 8'(half_pkg::exponent(magnitude));
      shift    = distance < 8'sd0 ? '0 : 6'(distance);
    end

    assign value = product_q[34:11];
    always_comb begin
      whole   = value >> shift_q;
      guard   = shift_q != '0 && 1'(value >> (shift_q - 6'd1));
      sticky  = shift_q > 6'd1 && (value & ~({24{1'b1}} << (shift_q - 6'd1))) != '0;
      rounded = over_q ? 8'd127 : 8'(whole) + 8'(guard && (sticky || whole[0]));
    end

    always_ff @(posedge clk_i) begin
      if (advance) begin
        product_q  <= half_pkg::mantissa(magnitude) * reciprocal_q;
        shift_q    <= shift;
        sign_q     <= in_data_i[lane*16+15];
        over_q     <= over[lane];
        sign_q2    <= sign_q;
        rounded_q2 <= rounded;
        out_data_o[lane*8+:8] <= sign_q2 ? -rounded_q2 : rounded_q2;
      end
    end

  end

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      clamped_o   <= 1'b0;
      nonfinite_o <= 1'b0;
    end else if (take) begin
      clamped_o   <= clamped_o || over != '0;
      nonfinite_o <= nonfinite_o || wild != '0;
    end
  end

endmodule

`default_nettype wire
