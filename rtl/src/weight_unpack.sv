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

endmodule

`default_nettype wire
