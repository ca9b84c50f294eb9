// SPDX-License-Identifier: Apache-2.0
// Weighted sums of values of one query: each beat is read, shifted to the new reference, and a product added; it is back in
// the store six cycles after update_i, and so long no other update may touch it.
//
// Widths: 15 bits with their sign times 21 make 35 and a sign, 4096 of them 48.
`default_nettype none

module attention_sums #(
    parameter int unsigned Lanes = 16,
    parameter int unsigned BeatsMax = 96,
    localparam int unsigned BeatBits = BeatsMax > 1 ? $clog2(BeatsMax) : 1
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                update_i,
    input  wire logic                fresh_i,   // the sums so far are zero
    input  wire logic [BeatBits-1:0] beat_i,    // of an update or of a read
    input  wire logic [         5:0] shift_i,
    input  wire logic [        20:0] weight_i,
    input  wire logic [Lanes*15-1:0] v_i,       // two cycles after update_i
    input  wire logic                read_i,
    output logic      [Lanes*48-1:0] sums_o     // the cycle after read_i, and until the next
);

  // update, fresh, beat, shift, weight
  localparam int unsigned TagBits = 2 + BeatBits + 27;
  logic [TagBits-1:0] tag[5];
  assign tag[0] = {update_i, fresh_i, beat_i, shift_i, weight_i};
  for (genvar stage = 1; stage < 5; stage++) begin : gen_tag
    logic [TagBits-1:0] tag_q;
    always_ff @(posedge clk_i) begin
      tag_q <= tag[stage-1];
      if (rst_i) tag_q[TagBits-1] <= 1'b0;
    end
    assign tag[stage] = tag_q;
  end

  (* ram_style = "block" *)
  logic [Lanes*48-1:0] sums[BeatsMax];
  logic [Lanes*48-1:0] fresh_sums;

  always_ff @(posedge clk_i) begin
    if (update_i || read_i) sums_o <= sums[beat_i];
    if (tag[4][TagBits-1]) sums[tag[4][27+:BeatBits]] <= fresh_sums;
  end

  for (genvar lane = 0; lane < Lanes; lane++) begin : gen_lane
    logic signed [47:0] kept_q, kept_q2, sum_q;
    logic signed [36:0] product_q;

    always_ff @(posedge clk_i) begin
      kept_q    <= tag[1][TagBits-2] ? 48'sd0 : signed'(sums_o[lane*48+:48]) >>> tag[1][26:21];
      kept_q2   <= kept_q;
      product_q <= signed'(v_i[lane*15+:15]) * signed'({1'b0, tag[2][20:0]});
      sum_q     <= kept_q2 + 48'(product_q);
    end
    assign fresh_sums[lane*48+:48] = sum_q;
  end

endmodule

`default_nettype wire
