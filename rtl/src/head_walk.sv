// SPDX-License-Identifier: Apache-2.0
// Walks through the beats of a row of query heads, and beside them through those of the key heads that they read: query head
// h reads key head h * kv_heads / heads.
`default_nettype none

module head_walk #(
    parameter int unsigned HeadsMax = 16,
    parameter int unsigned KvHeadsMax = 16,
    parameter int unsigned BeatsMax = 96,
    localparam int unsigned HeadBits = HeadsMax > 1 ? $clog2(HeadsMax) : 1,
    localparam int unsigned KvBits = KvHeadsMax > 1 ? $clog2(KvHeadsMax) : 1,
    localparam int unsigned BeatBits = BeatsMax > 1 ? $clog2(BeatsMax) : 1
) (
    input  wire logic                clk_i,
    input  wire logic                start_i,
    input  wire logic [         7:0] heads_i,
    input  wire logic [         7:0] kv_heads_i,
    input  wire logic [         7:0] head_beats_i,
    input  wire logic                step_i,
    output logic                     first_o,      // beat of its head
    output logic                     last_o,
    output logic                     row_last_o,
    output logic      [HeadBits-1:0] head_o,
    output logic      [BeatBits-1:0] beat_o,
    output logic      [  KvBits-1:0] kv_head_o,
    output logic      [BeatBits-1:0] kv_beat_o
);

  logic [7:0] head_q, head_beat_q, kv_head_q;
  logic [8:0] share_q;  // (head + 1) * kv_heads modulo heads
  logic [BeatBits-1:0] kv_base_q;

  assign first_o    = head_beat_q == '0;
  assign last_o     = head_beat_q + 8'd1 == head_beats_i;
  assign row_last_o = last_o && head_q + 8'd1 == heads_i;
  assign head_o     = HeadBits'(head_q);
  assign kv_head_o  = KvBits'(kv_head_q);
  assign kv_beat_o  = kv_base_q + BeatBits'(head_beat_q);

  always_ff @(posedge clk_i) begin
    if (start_i || (step_i && row_last_o)) begin
      head_q      <= '0;
      head_beat_q <= '0;
      kv_head_q   <= '0;
      kv_base_q   <= '0;
      beat_o      <= '0;
      share_q     <= 9'(kv_heads_i);
    end else if (step_i) begin
      beat_o      <= beat_o + 1'b1;
      head_beat_q <= last_o ? '0 : head_beat_q + 8'd1;
      if (last_o) begin
        head_q  <= head_q + 8'd1;
        share_q <= share_q + 9'(kv_heads_i);
        if (share_q >= 9'(heads_i)) begin
          share_q   <= share_q + 9'(kv_heads_i) - 9'(heads_i);
          kv_head_q <= kv_head_q + 8'd1;
          kv_base_q <= kv_base_q + BeatBits'(head_beats_i);
        end
      end
    end
  end

endmodule

`default_nettype wire
