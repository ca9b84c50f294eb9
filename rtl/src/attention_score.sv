// SPDX-License-Identifier: Apache-2.0
// From products of queries and keys to softmax weights, for one query: dot product of a head over its beats, score, weight,
// and the state of the head's running softmax. A beat comes aligned, a step leaves Latency cycles after a head's last.
//
// Widths: 256 products of 34 bits make 42, and a sign; without the last 16, 27. Times 17 bits: 44. The sum of up to 4096 weights of 21 bits
// takes 33; 34 are kept. Shifts of 64 and more give what 63 give.
`default_nettype none

module attention_score #(
    parameter int unsigned Lanes = 16,
    parameter int unsigned HeadsMax = 16,
    localparam int unsigned HeadBits = HeadsMax > 1 ? $clog2(HeadsMax) : 1,
    localparam int unsigned Depth = $clog2(Lanes),
    localparam int unsigned TreeLatency = Depth / 2
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    // a beat of a head; exponents and the rest stay the same for all of its beats
    input  wire logic                valid_i,
    input  wire logic                first_i,
    input  wire logic                last_i,
    input  wire logic                active_i,     // whether this query sees the key
    input  wire logic                fresh_i,      // its first
    input  wire logic [HeadBits-1:0] head_i,
    input  wire logic [Lanes*18-1:0] q_i,
    input  wire logic [Lanes*18-1:0] k_i,
    input  wire logic signed [  5:0] q_top_i,
    input  wire logic signed [  5:0] k_top_i,
    input  wire logic signed [  5:0] v_top_i,
    input  wire logic [        16:0] mantissa_i,
    input  wire logic signed [  7:0] exponent_i,
    // a step of a head
    output logic                     step_valid_o,
    output logic      [        20:0] step_weight_o,
    output logic      [         5:0] step_shift_o,
    output logic                     clamped_o,    // at once
    // the state of a head
    input  wire logic [HeadBits-1:0] read_head_i,
    output logic      [        33:0] total_o,
    output logic signed [       14:0] top_o,
    output logic signed [       14:0] value_top_o
);

  // --- products and their sum, then the head's
  logic [Lanes*36-1:0] products_q;
  logic signed [36+Depth-1:0] beat_sum;

  for (genvar lane = 0; lane < Lanes; lane++) begin : gen_product
    always_ff @(posedge clk_i) begin
      products_q[lane*36+:36] <= signed'(q_i[lane*18+:18]) * signed'(k_i[lane*18+:18]);
    end
  end

  adder_tree #(
      .Depth(Depth),
      .Width(36),
      .RegisterEvery(2)
  ) u_tree (
      .clk_i,
      .terms_i(products_q),
      .sum_o  (beat_sum)
  );

  // What travels beside: valid, first, last, active, fresh, head, exponents.
  localparam int unsigned TagBits = 5 + HeadBits + 8 + 6;
  localparam int unsigned Stages = TreeLatency + 6;
  logic signed [9:0] shift_sum;
  logic signed [7:0] shift;
  logic [TagBits-1:0] tag[Stages+1];
  assign shift_sum = 10'(q_top_i) + 10'(k_top_i) + 10'(exponent_i) + 10'sd18;
  // Beyond these nothing but a product's sign is left, or 18 does as much.
  assign shift = shift_sum < -10'sd64 ? -8'sd64 : shift_sum > 10'sd63 ? 8'sd63 : 8'(shift_sum);
  assign tag[0] = {valid_i, first_i, last_i, active_i, fresh_i, head_i, shift, v_top_i};
  for (genvar stage = 1; stage <= Stages; stage++) begin : gen_tag
    logic [TagBits-1:0] tag_q;
    always_ff @(posedge clk_i) begin
      tag_q <= tag[stage-1];
      if (rst_i) tag_q[TagBits-1] <= 1'b0;
    end
    assign tag[stage] = tag_q;
  end

  localparam int unsigned AtSum = 1 + TreeLatency;
  logic signed [42:0] dot_q;
  always_ff @(posedge clk_i) dot_q <= (tag[AtSum][TagBits-2] ? 43'sd0 : dot_q) + 43'(beat_sum);

  // --- score: 28 bits, 14 behind the point
  logic signed [26:0] high;
  logic signed [44:0] product_q;
  logic signed [7:0] score_shift;
  logic signed [62:0] wide;
  logic signed [27:0] score_q;
  logic over, under;

  assign high        = 27'(dot_q >>> 16);
  assign score_shift = signed'(tag[AtSum+2][13:6]);

  always_comb begin
    wide = 63'(product_q);
    if (score_shift < 8'sd0) wide = wide >>> (-score_shift);
    else wide = wide <<< (score_shift > 8'sd18 ? 8'sd18 : score_shift);
    over  = wide > 63'sd134217727;
    under = wide < -63'sd134217728;
  end

  always_ff @(posedge clk_i) begin
    product_q <= high * signed'({1'b0, mantissa_i});
    score_q   <= over ? 28'sh7ffffff : under ? 28'sh8000000 : 28'(wide);
  end

  wire logic seen = tag[AtSum+2][TagBits-1] && tag[AtSum+2][TagBits-3] && tag[AtSum+2][TagBits-4];
  assign clamped_o = seen && (over || under);

  // --- weight, two cycles
  logic [15:0] power;
  logic signed [13:0] whole_q, whole_q2;

  exp2_rom u_exp2 (
      .clk_i,
      .f_i    (score_q[13:0]),
      .value_o(power)
  );

  always_ff @(posedge clk_i) begin
    whole_q  <= score_q[27:14];
    whole_q2 <= whole_q;
  end

  // --- state
  localparam int unsigned AtStep = AtSum + 5;
  (* ram_style = "distributed" *)
  logic [63:0] states[HeadsMax];
  logic step_valid, step_active, step_fresh;
  logic [HeadBits-1:0] step_head;
  logic [63:0] state;
  logic signed [14:0] top, value_top, whole, value_whole, new_top, new_value_top;
  logic [33:0] total, new_total;
  logic [20:0] weight;

  function automatic logic [5:0] limited(input logic signed [15:0] by);
    limited = by > 16'sd63 ? 6'd63 : 6'(by);
  endfunction

  assign step_valid  = tag[AtStep][TagBits-1] && tag[AtStep][TagBits-3];
  assign step_active = tag[AtStep][TagBits-4];
  assign step_fresh  = tag[AtStep][TagBits-5];
  assign step_head   = tag[AtStep][14+:HeadBits];
  assign state       = states[step_head];

  always_comb begin
    {top, value_top, total} = state;
    if (step_fresh) begin
      top       = -15'sd8192;
      value_top = -15'sd8224;
      total     = '0;
    end
    weight        = {power, 5'd0};
    whole         = 15'(whole_q2);
    value_whole   = whole + 15'(signed'(tag[AtStep][5:0]));
    new_top       = whole > top ? whole : top;
    new_total     = (total >> limited(16'(new_top) - 16'(top))) + 34'(weight >> limited(16'(new_top) - 16'(whole)));
    new_value_top = value_whole > value_top ? value_whole : value_top;
  end

  always_ff @(posedge clk_i) begin
    if (step_valid && step_active) states[step_head] <= {new_top, new_value_top, new_total};
    step_valid_o  <= step_valid && !rst_i;
    step_weight_o <= step_active ? weight >> limited(16'(new_value_top) - 16'(value_whole)) : '0;
    step_shift_o  <= limited(16'(new_value_top) - 16'(value_top));
  end

  assign {top_o, value_top_o, total_o} = states[read_head_i];

endmodule

`default_nettype wire
