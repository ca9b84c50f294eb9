// SPDX-License-Identifier: Apache-2.0
// Takes the 768-bit beats of one matrix apart: floor((768 - 16) / VectorBits) index vectors from bit 0 on and above them one
// float16 norm weight. The vectors leave in groups for the weight buffer, the last group filled up with zeros; the first
// `norms` beats give a norm weight each. A matrix is max(ceil(vectors / vectors of a beat), norms) beats.
//
// A group is Vectors = min(vectors of a beat, Q/2) vectors. An index of 3^G or more in a vector that counts sets bad_index_o.
`default_nettype none

module weight_unpack #(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    parameter int unsigned Q = 16,  // even
    parameter int unsigned CountBits = 24,
    parameter int unsigned NormBits = 15,
    localparam int unsigned BeatBits = 768,
    localparam int unsigned IndexBits = $clog2(3 ** G),
    localparam int unsigned VectorBits = T * IndexBits,
    localparam int unsigned PerBeat = (BeatBits - 16) / VectorBits,
    localparam int unsigned Vectors = PerBeat < Q / 2 ? PerBeat : Q / 2
) (
    input  wire logic                          clk_i,
    input  wire logic                          rst_i,
    input  wire logic                          cmd_valid_i,
    output logic                               cmd_ready_o,
    input  wire logic [         CountBits-1:0] cmd_vectors_i,
    input  wire logic [          NormBits-1:0] cmd_norms_i,
    input  wire logic                          in_valid_i,
    output logic                               in_ready_o,
    input  wire logic [          BeatBits-1:0] in_data_i,
    output logic                               vec_valid_o,
    input  wire logic                          vec_ready_i,
    output logic      [Vectors*VectorBits-1:0] vec_data_o,
    output logic                               norm_valid_o,
    input  wire logic                          norm_ready_i,
    output logic      [                  15:0] norm_data_o,
    // sticky
    output logic                               bad_index_o
);

  localparam int unsigned Entries = 3 ** G;
  localparam int unsigned LaneBits = $clog2(PerBeat + 1);

  if (G < 1 || G > 5) begin : gen_illegal_g
    $error("weight_unpack: G %0d; 1 to 5 inputs an index are needed", G);
  end
  if (T < 1 || PerBeat < 1) begin : gen_illegal_t
    $error("weight_unpack: vectors of T %0d indices of %0d bits; 1 or more that fit %0d bits are needed", T, IndexBits,
           BeatBits - 16);
  end
  if (Q < 2 || Q % 2 != 0) begin : gen_illegal_q
    $error("weight_unpack: Q %0d; an even number of lanes is needed", Q);
  end

  // --- what is still to come
  logic [CountBits-1:0] vectors_q;
  logic [NormBits-1:0] norms_q;
  logic some_vectors, some_norms, final_vectors, group_ready, norm_ready, take;
  logic [LaneBits-1:0] lanes;

  assign some_vectors  = vectors_q != '0;
  assign some_norms    = norms_q != '0;
  assign cmd_ready_o   = !some_vectors && !some_norms;
  assign final_vectors = vectors_q <= CountBits'(PerBeat);
  assign lanes         = final_vectors ? LaneBits'(vectors_q) : LaneBits'(PerBeat);
  assign in_ready_o    = !cmd_ready_o && (!some_vectors || group_ready) && (!some_norms || norm_ready);
  assign take          = in_valid_i && in_ready_o;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      vectors_q <= '0;
      norms_q   <= '0;
    end else if (cmd_valid_i && cmd_ready_o) begin
      vectors_q <= cmd_vectors_i;
      norms_q   <= cmd_norms_i;
    end else if (take) begin
      vectors_q <= vectors_q - CountBits'(lanes);
      if (some_norms) norms_q <= norms_q - 1'b1;
    end
  end

  // --- vectors: a beat holds more of them than a group, as many, but hardly ever a multiple of as many
  logic unused_last;
  gearbox #(
      .Width(VectorBits),
      .In   (PerBeat),
      .Out  (Vectors)
  ) u_groups (
      .clk_i,
      .rst_i,
      .in_valid_i (take && some_vectors),
      .in_ready_o (group_ready),
      .in_data_i  (in_data_i[PerBeat*VectorBits-1:0]),
      .in_lanes_i (lanes),
      .in_last_i  (final_vectors),
      .out_valid_o(vec_valid_o),
      .out_ready_i(vec_ready_i),
      .out_data_o (vec_data_o),
      .out_last_o (unused_last)
  );

  skid #(
      .Width(16)
  ) u_norms (
      .clk_i,
      .rst_i,
      .valid_i(take && some_norms),
      .ready_o(norm_ready),
      .data_i (in_data_i[PerBeat*VectorBits+:16]),
      .valid_o(norm_valid_o),
      .ready_i(norm_ready_i),
      .data_o (norm_data_o)
  );

  // --- indices that no table has
  logic [PerBeat-1:0] bad, bad_q;
  for (genvar lane = 0; lane < PerBeat; lane++) begin : gen_lane
    logic [T-1:0] beyond;
    for (genvar index = 0; index < T; index++) begin : gen_index
      assign beyond[index] = in_data_i[lane*VectorBits+index*IndexBits+:IndexBits] >= IndexBits'(Entries);
    end
    assign bad[lane] = beyond != '0 && LaneBits'(lane) < lanes;
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      bad_q       <= '0;
      bad_index_o <= 1'b0;
    end else begin
      bad_q       <= take ? bad : '0;
      bad_index_o <= bad_index_o || bad_q != '0;
    end
  end

  // Bits of a beat past the norm weight.
  logic [BeatBits-1:0] unused_rest;
  assign unused_rest = in_data_i >> (PerBeat * VectorBits + 16);

endmodule

`default_nettype wire
