// SPDX-License-Identifier: Apache-2.0
// Sums of a row to float16, times the row's scale and the matrix's constant, rounded once; then what is fused with it: see
// fuse_pair. A row is a command and as many beats; the side stream brings the residual or the gate beat for beat, or, for a
// rotation, the angles of one head with the first head's beats, which are kept for the others.
//
// A beat a cycle; a row costs three cycles more, for its factor. Sums beyond 2^26 - 1 are clamped, so a product has
// 27 + 17 = 44 bits.
//
// A row that ends before its command says gives short_frame_o, and its last beat is marked where it ended; of one that does
// not end where it should the rest is dropped up to its end, long_frame_o. Either way the side's beats of this row are
// taken, so that the next row meets its own. Sticky, like the other status outputs.
`default_nettype none

module dequant_fuse
#(
    parameter int unsigned Lanes = 16,
    parameter int unsigned HeadBeatsMax = 16
) (
    input  wire logic                     clk_i,
    input  wire logic                     rst_i,
    input  wire logic                     cmd_valid_i,
    output logic                          cmd_ready_o,
    input  wire logic        [       2:0] cmd_mode_i,
    input  wire logic        [      14:0] cmd_scale_i,      // bits of s
    input  wire logic        [      16:0] cmd_mantissa_i,
    input  wire logic signed [       7:0] cmd_exponent_i,
    input  wire logic        [      15:0] cmd_beats_i,      // not zero
    input  wire logic        [       7:0] cmd_head_beats_i, // of a rotation
    input  wire logic                     acc_valid_i,
    output logic                          acc_ready_o,
    input  wire logic        [Lanes*32-1:0] acc_data_i,
    input  wire logic                     acc_last_i,
    input  wire logic                     side_valid_i,
    output logic                          side_ready_o,
    input  wire logic        [Lanes*16-1:0] side_data_i,
    output logic                          out_valid_o,
    input  wire logic                     out_ready_i,
    output logic             [Lanes*16-1:0] out_data_o,
    output logic                          out_last_o,
    output logic                          nonfinite_o,
    output logic                          saturated_o,
    output logic                          acc_clamp_o,
    output logic                          short_frame_o,
    output logic                          long_frame_o
);

  localparam int unsigned AngleBits = HeadBeatsMax > 1 ? $clog2(HeadBeatsMax) : 1;
  // the product's register, rounding, and what follows
  localparam int unsigned Before = 1 + 3;
  localparam int unsigned Stages = Before + fuse_pkg::Latency;

  if (Lanes < 2 || Lanes % 2 != 0) begin : gen_illegal_lanes
    $error("dequant_fuse: Lanes %0d; an even number is needed, a rotation takes two", Lanes);
  end

  // --- the row in hand: two cycles for its factor, then beats
  logic [1:0] starting_q;
  logic row_q, draining_q;
  logic [2:0] mode_q;
  logic [15:0] left_q;
  logic [7:0] head_beats_q, head_beat_q;
  logic first_head_q;
  logic [15:0] skip_q, side_left;  // beats of the side that no sum came for
  logic [16:0] factor;
  logic signed [8:0] factor_exponent;
  logic start, advance, take, wants_side, ends;

  assign cmd_ready_o = starting_q == '0 && !row_q && !draining_q && skip_q == '0;
  assign start       = cmd_valid_i && cmd_ready_o;

  row_factor u_factor (
      .clk_i,
      .start_i   (start),
      .scale_i   (cmd_scale_i),
      .mantissa_i(cmd_mantissa_i),
      .exponent_i(cmd_exponent_i),
      .mantissa_o(factor),
      .exponent_o(factor_exponent)
  );

  assign wants_side   = mode_q != fuse_pkg::Bypass && (mode_q != fuse_pkg::Rope || first_head_q);
  assign take         = row_q && acc_valid_i && advance && (!wants_side || side_valid_i);
  assign acc_ready_o  = draining_q || (row_q && advance && (!wants_side || side_valid_i));
  assign side_ready_o = (take && wants_side) || skip_q != '0;
  assign ends         = acc_last_i || left_q == 16'd1;

  always_comb begin
    side_left = '0;
    if (wants_side) side_left = mode_q == fuse_pkg::Rope ? 16'(head_beats_q - head_beat_q) - 16'd1 : left_q - 16'd1;
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      starting_q    <= '0;
      row_q         <= 1'b0;
      draining_q    <= 1'b0;
      skip_q        <= '0;
      short_frame_o <= 1'b0;
      long_frame_o  <= 1'b0;
    end else begin
      starting_q <= {starting_q[0], start};
      if (starting_q[1]) row_q <= 1'b1;
      if (take && ends) begin
        row_q         <= 1'b0;
        draining_q    <= !acc_last_i;
        short_frame_o <= short_frame_o || left_q != 16'd1;
        long_frame_o  <= long_frame_o || !acc_last_i;
      end
      if (draining_q && acc_valid_i && acc_last_i) draining_q <= 1'b0;
      if (take && ends) skip_q <= side_left;
      else if (skip_q != '0 && side_valid_i) skip_q <= skip_q - 16'd1;
    end
  end

  always_ff @(posedge clk_i) begin
    if (start) begin
      mode_q       <= cmd_mode_i;
      left_q       <= cmd_beats_i;
      head_beats_q <= cmd_head_beats_i;
      head_beat_q  <= '0;
      first_head_q <= 1'b1;
    end else if (take) begin
      left_q <= left_q - 16'd1;
      if (head_beat_q + 8'd1 == head_beats_q) begin
        head_beat_q  <= '0;
        first_head_q <= 1'b0;
      end else begin
        head_beat_q <= head_beat_q + 8'd1;
      end
    end
  end

  // --- angles of a head
  (* ram_style = "distributed" *)
  logic [Lanes*16-1:0] angles[HeadBeatsMax];
  logic [Lanes*16-1:0] side;
  assign side = wants_side ? side_data_i : angles[head_beat_q[AngleBits-1:0]];

  always_ff @(posedge clk_i) begin
    if (take && wants_side) angles[head_beat_q[AngleBits-1:0]] <= side_data_i;
  end

  // --- what travels with a beat until it is fused
  logic [Stages-1:0] valid_q, last_q;
  logic [2:0] mode_at[Before];
  logic [Lanes*16-1:0] side_at[Before];

  assign advance     = out_ready_i || !valid_q[Stages-1];
  assign out_valid_o = valid_q[Stages-1];
  assign out_last_o  = last_q[Stages-1];

  for (genvar stage = 0; stage < Before; stage++) begin : gen_beside
    logic [2:0] mode_q2;
    logic [Lanes*16-1:0] side_q2;
    always_ff @(posedge clk_i) begin
      if (advance) begin
        mode_q2 <= stage == 0 ? mode_q : mode_at[stage == 0 ? 0 : stage - 1];
        side_q2 <= stage == 0 ? side : side_at[stage == 0 ? 0 : stage - 1];
      end
    end
    assign mode_at[stage] = mode_q2;
    assign side_at[stage] = side_q2;
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) valid_q <= '0;
    else if (advance) valid_q <= {valid_q[Stages-2:0], take};
    if (advance) last_q <= {last_q[Stages-2:0], ends};
  end

  // --- lanes
  logic [Lanes-1:0] clamped, early, wild_pairs, late;
  logic [Lanes*16-1:0] y;
  logic signed [8:0] exponent_q;

  always_ff @(posedge clk_i) if (advance) exponent_q <= factor_exponent;

  for (genvar lane = 0; lane < Lanes; lane++) begin : gen_lane
    logic signed [31:0] acc;
    logic signed [26:0] limited;
    logic signed [44:0] product_q;

    assign acc = signed'(acc_data_i[lane*32+:32]);
    assign clamped[lane] = acc > 32'sh3ffffff || acc < -32'sh3ffffff;

    always_comb begin
      limited = 27'(acc);
      if (acc > 32'sh3ffffff) limited = 27'sh3ffffff;
      if (acc < -32'sh3ffffff) limited = -27'sh3ffffff;
    end

    always_ff @(posedge clk_i) if (advance) product_q <= limited * signed'({1'b0, factor});

    half_pack #(
        .Width(45),
        .ExponentBits(9)
    ) u_round (
        .clk_i,
        .enable_i   (advance),
        .value_i    (product_q),
        .exponent_i (exponent_q),
        .half_o     (y[lane*16+:16]),
        .saturated_o(early[lane])
    );
  end

  for (genvar pair = 0; pair < Lanes / 2; pair++) begin : gen_pair
    fuse_pair u_fuse (
        .clk_i,
        .enable_i   (advance),
        .mode_i     (mode_at[Before-1]),
        .y_i        (y[pair*32+:32]),
        .side_i     (side_at[Before-1][pair*32+:32]),
        .out_o      (out_data_o[pair*32+:32]),
        .nonfinite_o(wild_pairs[pair]),
        .saturated_o(late[pair])
    );
  end
  assign wild_pairs[Lanes-1:Lanes/2] = '0;
  assign late[Lanes-1:Lanes/2]       = '0;

  // --- status
  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      nonfinite_o <= 1'b0;
      saturated_o <= 1'b0;
      acc_clamp_o <= 1'b0;
    end else if (advance) begin
      acc_clamp_o <= acc_clamp_o || (take && clamped != '0);
      nonfinite_o <= nonfinite_o || (valid_q[Before-1] && wild_pairs != '0);
      saturated_o <= saturated_o || (valid_q[Before-1] && early != '0) || (valid_q[Stages-1] && late != '0);
    end
  end

endmodule

`default_nettype wire
