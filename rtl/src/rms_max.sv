// SPDX-License-Identifier: Apache-2.0
// RMS norm of a row and the largest magnitude of what it puts out; a row without a norm passes and only its maximum is taken.
//
// A row with a norm is taken in and its largest exponent found; read for the sum of squares; after a division and a root read
// once more for the products. Three times its beats and some 70 cycles. The weights of the norm stay for all rows: w_start_i
// begins new ones, which come lane by lane, and not while a row with a norm is on its way.
//
// Widths: an aligned value has 17 bits, a row of 2^14 squares of 34 bits 48, eps 47, their sum 49. mx mw r has
// 11 + 11 + 17 bits and a sign; its exponent lies in -86 .. 25.
//
// Frames: as dequant_fuse's.
`default_nettype none

module rms_max #(
    parameter int unsigned Lanes = 16,
    parameter int unsigned RowBeatsMax = 256
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                cmd_valid_i,
    output logic                     cmd_ready_o,
    input  wire logic                cmd_norm_i,
    input  wire logic [        15:0] cmd_beats_i,  // 1 to RowBeatsMax
    input  wire logic [        14:0] cmd_width_i,  // 1 to 2^14
    input  wire logic [        46:0] cmd_eps_i,
    input  wire logic                w_start_i,
    input  wire logic                w_valid_i,
    input  wire logic [        15:0] w_data_i,
    input  wire logic                in_valid_i,
    output logic                     in_ready_o,
    input  wire logic [Lanes*16-1:0] in_data_i,
    input  wire logic                in_last_i,
    output logic                     out_valid_o,
    input  wire logic                out_ready_i,
    output logic      [Lanes*16-1:0] out_data_o,
    output logic                     out_last_o,
    // bits of the row's largest magnitude, after its last beat has left
    output logic                     max_valid_o,
    input  wire logic                max_ready_i,
    output logic      [        14:0] max_data_o,
    output logic                     nonfinite_o,
    output logic                     saturated_o,
    output logic                     short_frame_o,
    output logic                     long_frame_o
);

  localparam int unsigned PlaceBits = RowBeatsMax > 1 ? $clog2(RowBeatsMax) : 1;
  localparam int unsigned LaneBits = Lanes > 1 ? $clog2(Lanes) : 1;
  localparam int unsigned Depth = $clog2(Lanes);
  localparam int unsigned TreeLatency = Depth / 2;
  localparam logic signed [5:0] Floor = -6'sd18;

  if (Lanes < 1 || (Lanes & (Lanes - 1)) != 0) begin : gen_illegal_lanes
    $error("rms_max: Lanes %0d is no power of two", Lanes);
  end

  typedef enum logic [2:0] {
    Idle,
    Pass,
    Fill,
    Sum,
    Root,
    Scale
  } state_e;

  state_e state_q;
  logic [15:0] left_q, beats_q;
  logic [14:0] width_q;
  logic [46:0] eps_q;
  logic draining_q, take, ends, advance, leaves;

  assign cmd_ready_o = state_q == Idle && !max_valid_o && !draining_q;
  assign in_ready_o  = draining_q || state_q == Fill || (state_q == Pass && left_q != '0 && advance);
  assign take        = in_valid_i && in_ready_o && !draining_q;
  assign ends        = in_last_i || left_q == 16'd1;
  assign leaves      = out_valid_o && out_ready_i;

  // --- stores: the row, and the norm's weights, written lane by lane
  (* ram_style = "block" *)
  logic [Lanes*16-1:0] row[RowBeatsMax];
  logic [PlaceBits-1:0] place_q;
  logic [Lanes*16-1:0] x_q, w_q;

  always_ff @(posedge clk_i) begin
    if (take && state_q == Fill) row[place_q] <= in_data_i;
    if (advance) x_q <= row[place_q];
  end

  logic [PlaceBits-1:0] w_place_q;
  logic [LaneBits-1:0] w_lane_q;
  for (genvar lane = 0; lane < Lanes; lane++) begin : gen_weight
    (* ram_style = "block" *)
    logic [15:0] weights[RowBeatsMax];
    always_ff @(posedge clk_i) begin
      if (w_valid_i && 32'(w_lane_q) == lane) weights[w_place_q] <= w_data_i;
      if (advance) w_q[lane*16+:16] <= weights[place_q];
    end
  end

  always_ff @(posedge clk_i) begin
    if (rst_i || w_start_i) begin
      w_place_q <= '0;
      w_lane_q  <= '0;
    end else if (w_valid_i) begin
      w_lane_q <= 32'(w_lane_q) == Lanes - 1 ? '0 : w_lane_q + 1'b1;
      if (32'(w_lane_q) == Lanes - 1) w_place_q <= w_place_q + 1'b1;
    end
  end

  // --- in: largest exponent and magnitude of a beat
  logic signed [5:0] beat_top, top_q;
  logic wild;

  always_comb begin
    beat_top = Floor;
    wild     = 1'b0;
    for (int unsigned lane = 0; lane < Lanes; lane++) begin
      if (half_pkg::exponent(half_pkg::finite(in_data_i[lane*16+:15])) > beat_top) begin
        beat_top = half_pkg::exponent(half_pkg::finite(in_data_i[lane*16+:15]));
      end
      wild = wild || half_pkg::nonfinite(in_data_i[lane*16+:15]);
    end
  end

  // --- sum of squares: the store's register, aligned, squared, added
  logic [TreeLatency+2:0] summing_q;
  logic summed;
  logic signed [35+Depth-1:0] squares;
  logic [Lanes*35-1:0] terms_q;
  logic [48:0] total_q;

  for (genvar lane = 0; lane < Lanes; lane++) begin : gen_square
    logic [16:0] aligned_q;
    always_ff @(posedge clk_i) begin
      aligned_q <= {half_pkg::mantissa(half_pkg::finite(x_q[lane*16+:15])), 6'd0}
                   >> (top_q - half_pkg::exponent(half_pkg::finite(x_q[lane*16+:15])));
      terms_q[lane*35+:35] <= 35'(aligned_q * aligned_q);
    end
  end

  adder_tree #(
      .Depth(Depth),
      .Width(35),
      .RegisterEvery(2)
  ) u_tree (
      .clk_i,
      .terms_i(terms_q),
      .sum_o  (squares)
  );

  assign summed = state_q == Sum && left_q == '0 && summing_q == '0;

  always_ff @(posedge clk_i) begin
    if (rst_i) summing_q <= '0;
    else summing_q <= (TreeLatency + 3)'({summing_q, state_q == Sum && left_q != '0});
    if (state_q == Fill) total_q <= '0;
    else if (summing_q[TreeLatency+2]) total_q <= total_q + 49'(unsigned'(squares));
  end

  // --- root
  logic root_started_q, root_done;
  logic [48:0] total;
  logic [16:0] root;
  logic [5:0] half_k;

  assign total = total_q + 49'(eps_q >> {top_q - Floor, 1'b0});

  inverse_root u_root (
      .clk_i,
      .rst_i,
      .start_i (state_q == Root && !root_started_q),
      .total_i (total == '0 ? 49'd1 : total),
      .width_i (width_q),
      .done_o  (root_done),
      .root_o  (root),
      .half_k_o(half_k)
  );

  // --- out: the store's register, the product of mantissas, times the root, rounding
  logic [5:0] valid_q, last_q;
  logic scaling, pass_q;
  logic [Lanes*16-1:0] scaled, passed_q;
  logic [Lanes-1:0] saturated;

  assign scaling     = state_q == Scale && left_q != '0;
  assign advance     = out_ready_i || !out_valid_o || state_q == Sum;
  assign out_valid_o = pass_q ? valid_q[0] : valid_q[5];
  assign out_last_o  = pass_q ? last_q[0] : last_q[5];
  assign out_data_o  = pass_q ? passed_q : scaled;

  for (genvar lane = 0; lane < Lanes; lane++) begin : gen_scale
    logic [14:0] x, w;
    logic signed [22:0] product_q;
    logic signed [40:0] value_q;
    logic signed [7:0] exponent_q, exponent_q2;

    assign x = half_pkg::finite(x_q[lane*16+:15]);
    assign w = half_pkg::finite(w_q[lane*16+:15]);

    always_ff @(posedge clk_i) begin
      if (advance) begin
        product_q   <= x_q[lane*16+15] ^ w_q[lane*16+15] ? -(23'(half_pkg::mantissa(x) * half_pkg::mantissa(w)))
                                                          : 23'(half_pkg::mantissa(x) * half_pkg::mantissa(w));
        exponent_q  <= 8'(half_pkg::exponent(x)) + 8'(half_pkg::exponent(w)) + 8'sd6 - 8'(top_q) - 8'(half_k);
        value_q     <= product_q * signed'({1'b0, root});
        exponent_q2 <= exponent_q;
      end
    end

    half_pack #(
        .Width(41),
        .ExponentBits(8)
    ) u_round (
        .clk_i,
        .enable_i   (advance),
        .value_i    (value_q),
        .exponent_i (exponent_q2),
        .half_o     (scaled[lane*16+:16]),
        .saturated_o(saturated[lane])
    );
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) valid_q <= '0;
    else if (advance) valid_q <= {valid_q[4:0] & {5{!pass_q}}, pass_q ? take : scaling};
    if (advance) begin
      last_q   <= {last_q[4:0], pass_q ? ends : left_q == 16'd1};
      passed_q <= in_data_i;
    end
  end

  // --- maximum of what leaves
  logic [14:0] beat_max;
  always_comb begin
    beat_max = '0;
    for (int unsigned lane = 0; lane < Lanes; lane++) begin
      if (half_pkg::finite(out_data_o[lane*16+:15]) > beat_max) beat_max = half_pkg::finite(out_data_o[lane*16+:15]);
    end
  end

  always_ff @(posedge clk_i) begin
    if (cmd_valid_i && cmd_ready_o) max_data_o <= '0;
    else if (leaves && beat_max > max_data_o) max_data_o <= beat_max;
  end

  // --- the row's way
  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      state_q        <= Idle;
      draining_q     <= 1'b0;
      max_valid_o    <= 1'b0;
      root_started_q <= 1'b0;
      nonfinite_o    <= 1'b0;
      saturated_o    <= 1'b0;
      short_frame_o  <= 1'b0;
      long_frame_o   <= 1'b0;
    end else begin
      case (state_q)
        Idle:    if (cmd_valid_i && cmd_ready_o) state_q <= cmd_norm_i ? Fill : Pass;
        Fill:    if (take && ends) state_q <= Sum;
        Sum:     if (summed) state_q <= Root;
        Root:    if (root_done) state_q <= Scale;
        default: if (leaves && out_last_o) state_q <= Idle;
      endcase
      root_started_q <= state_q == Root;
      if (leaves && out_last_o) max_valid_o <= 1'b1;
      else if (max_ready_i) max_valid_o <= 1'b0;
      if (take && ends) begin
        draining_q    <= !in_last_i;
        short_frame_o <= short_frame_o || left_q != 16'd1;
        long_frame_o  <= long_frame_o || !in_last_i;
      end
      if (draining_q && in_valid_i && in_last_i) draining_q <= 1'b0;
      nonfinite_o <= nonfinite_o || (take && wild) || (w_valid_i && half_pkg::nonfinite(w_data_i[14:0]));
      saturated_o <= saturated_o || (valid_q[5] && !pass_q && saturated != '0);
    end
  end

  always_ff @(posedge clk_i) begin
    case (state_q)
      Idle: begin
        pass_q  <= !cmd_norm_i;
        left_q  <= cmd_beats_i;
        beats_q <= cmd_beats_i;
        width_q <= cmd_width_i;
        eps_q   <= cmd_eps_i;
        place_q <= '0;
        top_q   <= Floor;
      end
      Pass: if (take) left_q <= ends ? '0 : left_q - 16'd1;
      Fill: begin
        if (take) begin
          left_q  <= left_q - 16'd1;
          place_q <= place_q + 1'b1;
          if (beat_top > top_q) top_q <= beat_top;
          if (ends) begin
            left_q  <= beats_q - left_q + 16'd1;
            beats_q <= beats_q - left_q + 16'd1;
            place_q <= '0;
          end
        end
      end
      Sum: begin
        if (left_q != '0) begin
          left_q  <= left_q - 16'd1;
          place_q <= place_q + 1'b1;
        end
      end
      Root: begin
        left_q  <= beats_q;
        place_q <= '0;
      end
      default: begin
        if (scaling && advance) begin
          left_q  <= left_q - 16'd1;
          place_q <= place_q + 1'b1;
        end
      end
    endcase
  end

endmodule

`default_nettype wire
