// SPDX-License-Identifier: Apache-2.0
// The gradient on tensor cores: 16-bit inputs, keys of up to 128 channels.
//
// Three kernels over chunks of 64 tokens (A, P, E as in the room's README, D = diag(beta)):
//   prepare   every chunk: running sums of g, P, and X = A (I + D A)^-1, from which W = R - X D R and dY = dU - X^T D dU
//   sweeps    first chunk to last: W, and the state before each chunk; at the same time, in other blocks, last chunk to
//             first: dY, and the gradient of the state behind each chunk
//   collect   every chunk: E, N and from them dq, dk, dv, dbeta, dg
// Only `sweeps` is sequential. Columns of the state are independent, so a warpgroup holds 64 of them for all
// keys and needs no other: the state's transpose is the accumulator of one product and the register operand of the next.
#pragma once

#include "hopper/stream.h"
#include "ops/linear_attention/cuda/problem.h"

namespace tilewright::linear_attention::cuda {

enum class Storage { kBf16, kF16 };

struct ChunkBackward {
  static constexpr int kMaxKeySize = 128;
  static constexpr int kMaxValueSize = 256;
  static constexpr int kSlice = 64;  // columns of the state that a warpgroup holds
  // G in base 2, exp(G), exp(G_n - G), beta: 64 floats each. With a decay a channel, exp(G_n) by channel, and beta.
  static constexpr int kFactors = 4;

  Storage storage;
  Rule rule;
  Decay decay;
  Sequences sequences;
  int batches, heads, value_heads, key_size, value_size;  // sizes are multiples of 8
  float scale;
  Rows<const uint16_t> q, k, v, d_out;  // bases and strides are multiples of 16 bytes
  Rows<const float> beta, g;
  const float* initial_state;  // [N, HV, K, V], or by chunk as forward keeps states; null: zero
  bool initial_by_chunk;
  const float* d_final_state;  // [N, HV, K, V]

  // Scratch by chunk and value head, tiles as shared memory holds them; rows without a token are zero.
  float* factors;  // [chunk_places, HV, kFactors, 64]
  uint16_t* attention;  // [chunk_places, HV, 64, 64]: P
  uint16_t* inverse;  // [chunk_places, HV, 64, 64]: X; delta rule
  uint16_t *keys_into, *keys_onto, *queries_into;  // [chunk_places, HV, 64, kMaxKeySize]: k exp(G), k exp(G_n - G) and
  // scale q exp(G); with a decay a channel
  uint16_t* states;  // [chunk_places, HV, slices, 64, kMaxKeySize]: S^T before the chunk
  uint16_t* d_states;  // the same of dS^T behind the chunk
  uint16_t* errors;  // [chunk_places, HV, slices, 64, 64]: W; delta rule
  uint16_t* d_errors;  // dY, or dV of the additive rule

  // Results, contiguous.
  uint16_t *dq, *dk;  // [B, T, H, K]: summed over the value heads of a group
  float *dq_wide, *dk_wide;  // [B, T, HV, K], in place of these with a decay a channel
  uint16_t* dv;  // [B, T, HV, V]
  float* d_beta;  // [B, T, HV]
  float* dg;  // [B, T, HV], or with a decay a channel [B, T, HV, K]
  float* d_initial_state;  // [N, HV, K, V]

  constexpr int slices() const { return (value_size + kSlice - 1) / kSlice; }
  constexpr int64_t places() const {
    return chunk_places(sequences.count, sequences.tokens, sequences.offsets != nullptr);
  }
};

void launch_chunk_backward(const ChunkBackward& problem, hopper::Stream stream);
void launch_channel_backward(const ChunkBackward& problem, hopper::Stream stream);  // with a decay a channel

}  // namespace tilewright::linear_attention::cuda
