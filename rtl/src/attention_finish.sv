// SPDX-License-Identifier: Apache-2.0
// Ends a block of queries: of each query and head the reciprocal of its sum of weights, P divisions at a time, then the rows,
// newest query first, a beat a cycle.
//
// Widths: a sum without its last 8 bits has 40, times 17 bits 57 and a sign. Weights of a query's first key are 2^20 at
// least and stay so relative to its largest, so a total has 21 to 34 bits. The result's exponent lies in -69 .. -5.
`default_nettype none

module attention_finish #(
    parameter int unsigned P = 4,
    parameter int unsigned Lanes = 16,
    parameter int unsigned HeadsMax = 16,
    parameter int unsigned BeatsMax = 96,
    localparam int unsigned HeadBits = HeadsMax > 1 ? $clog2(HeadsMax) : 1,
    localparam int unsigned BeatBits = BeatsMax > 1 ? $clog2(BeatsMax) : 1,
    localparam int unsigned QueryBits = $clog2(P + 1)
) (
    input  wire logic                    clk_i,
    input  wire logic                    rst_i,
    input  wire logic                    start_i,
    output logic                         busy_o,
    input  wire logic [             7:0] heads_i,
    input  wire logic [             7:0] head_beats_i,
    input  wire logic [   QueryBits-1:0] queries_i,
    // states of the queries
    output logic      [    HeadBits-1:0] state_head_o,
    input  wire logic [        P*34-1:0] totals_i,
    input  wire logic [        P*15-1:0] tops_i,
    input  wire logic [        P*15-1:0] value_tops_i,
    // their sums, a cycle after read_o
    output logic                         read_o,
    output logic      [    BeatBits-1:0] read_beat_o,
    input  wire logic [P*Lanes*48-1:0]   sums_i,
    output logic                         out_valid_o,
    input  wire logic                    out_ready_i,
    output logic      [    Lanes*16-1:0] out_data_o,
    output logic                         out_last_o,
    output logic                         saturated_o  // at once
);

  typedef enum logic [1:0] {
    Idle,
    Take,
    Divide,
    Write
  } state_e;

  state_e state_q;
  logic [7:0] head_q;
  logic [P-1:0] quotient_valid;
  logic divided;

  // rows out
  logic [QueryBits-1:0] query_q;
  logic [HeadBits-1:0] write_head;
  logic [5:0] valid_q, last_q;
  logic all_issued_q, issue, advance, row_last;

  assign busy_o       = state_q != Idle;
  assign state_head_o = HeadBits'(head_q);
  assign divided      = quotient_valid == '1;

  // --- reciprocals
  logic [P*25-1:0] factors;  // of the head and beat that is written: mantissa, exponent

  for (genvar query = 0; query < P; query++) begin : gen_query
    (* ram_style = "distributed" *)
    logic [24:0] known[HeadsMax];
    logic [33:0] total_q;
    logic signed [7:0] difference_q;
    logic [5:0] length;
    logic [32:0] quotient;
    logic ready;

    always_comb begin
      length = 6'd17;
      for (int unsigned place = 17; place < 34; place++) if (total_q[place]) length = 6'(place + 1);
    end

    divider #(
        .DividendBits(33),
        .DivisorBits(17)
    ) u_reciprocal (
        .clk_i,
        .rst_i,
        .valid_i   (state_q == Divide && ready && !quotient_valid[query] && head_new_q),
        .ready_o   (ready),
        .dividend_i('1),
        .divisor_i (17'(total_q >> (length - 6'd17))),
        .valid_o   (quotient_valid[query]),
        .ready_i   (divided),
        .quotient_o(quotient)
    );

    always_ff @(posedge clk_i) begin
      if (state_q == Take) begin
        total_q      <= totals_i[query*34+:34];
        difference_q <= 8'(signed'(value_tops_i[query*15+:15]) - signed'(tops_i[query*15+:15]));
      end
      if (divided) known[head_q[HeadBits-1:0]] <= {17'(quotient), difference_q - 8'(length) - 8'sd11};
    end
    assign factors[query*25+:25] = known[write_head];
  end

  logic head_new_q;
  always_ff @(posedge clk_i) head_new_q <= state_q == Take;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      state_q <= Idle;
    end else begin
      case (state_q)
        Idle:   if (start_i) state_q <= Take;
        Take:   state_q <= Divide;
        Divide: if (divided) state_q <= head_q + 8'd1 == heads_i ? Write : Take;
        Write:  if (out_valid_o && out_ready_i && out_last_o && all_issued_q && valid_q[4:0] == '0) state_q <= Idle;
      endcase
    end
    if (state_q == Idle) head_q <= '0;
    else if (state_q == Divide && divided) head_q <= head_q + 8'd1;
  end

  // --- rows out
  assign advance     = out_ready_i || !valid_q[5];
  assign issue       = state_q == Write && !all_issued_q;
  assign read_o      = issue && advance;
  assign out_valid_o = valid_q[5];
  assign out_last_o  = last_q[5];

  logic unused_first, unused_last, unused_kv_head;
  logic [BeatBits-1:0] unused_kv_beat;

  head_walk #(
      .HeadsMax(HeadsMax),
      .KvHeadsMax(1),
      .BeatsMax(BeatsMax)
  ) u_walk (
      .clk_i,
      .start_i     (state_q == Idle),
      .heads_i,
      .kv_heads_i  (8'd1),
      .head_beats_i,
      .step_i      (read_o),
      .first_o     (unused_first),
      .last_o      (unused_last),
      .row_last_o  (row_last),
      .head_o      (write_head),
      .beat_o      (read_beat_o),
      .kv_head_o   (unused_kv_head),
      .kv_beat_o   (unused_kv_beat)
  );

  always_ff @(posedge clk_i) begin
    if (state_q == Idle) begin
      query_q      <= '0;
      all_issued_q <= 1'b0;
    end else if (read_o && row_last) begin
      query_q      <= query_q + 1'b1;
      all_issued_q <= query_q + 1'b1 == queries_i;
    end
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) valid_q <= '0;
    else if (advance) valid_q <= {valid_q[4:0], issue};
    if (advance) last_q <= {last_q[4:0], row_last};
  end

  // --- the store's register, then the query's sum and factor, the product, rounding
  logic [QueryBits-1:0] query_q2;
  logic [24:0] factor_q, factor_q2;
  logic [Lanes-1:0] saturated;
  logic signed [7:0] exponent_q3;

  always_ff @(posedge clk_i) begin
    if (advance) begin
      query_q2    <= query_q;
      factor_q    <= 25'(factors >> (32'(query_q) * 25));
      factor_q2   <= factor_q;
      exponent_q3 <= signed'(factor_q2[7:0]);
    end
  end

  for (genvar lane = 0; lane < Lanes; lane++) begin : gen_lane
    logic signed [39:0] sum_q;
    logic signed [57:0] value_q;
    logic [P*40-1:0] high;
    for (genvar query = 0; query < P; query++) begin : gen_high
      assign high[query*40+:40] = sums_i[(query*Lanes+lane)*48+8+:40];
    end

    always_ff @(posedge clk_i) begin
      if (advance) begin
        sum_q   <= signed'(40'(high >> (32'(query_q2) * 40)));
        value_q <= sum_q * signed'({1'b0, factor_q2[24:8]});
      end
    end

    half_pack #(
        .Width(58),
        .ExponentBits(8)
    ) u_round (
        .clk_i,
        .enable_i   (advance),
        .value_i    (value_q),
        .exponent_i (exponent_q3),
        .half_o     (out_data_o[lane*16+:16]),
        .saturated_o(saturated[lane])
    );
  end
  assign saturated_o = valid_q[5] && saturated != '0;

endmodule

`default_nettype wire
