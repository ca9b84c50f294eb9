// SPDX-License-Identifier: Apache-2.0
// The gradient for every size, rule, decay and precision: token by token in multiply-adds of T (float or double).
//
// No state is kept for the backward pass. Three sweeps over the tokens, each of a block with 32 columns of the state:
//   errors   forwards:  W = v - S^T k, what each token corrects (delta rule only)
//   reverse  backwards: dU = dS^T k, dY, dV, dbeta, dk of the key that writes; dS at the ends of chunks is kept
//   forward  forwards:  S again, now from W: dq, dk of the key that reads, and dS o S at the ends of chunks
// and `collect`, which adds up the columns' parts in order and sums dg from the end of each chunk.
#pragma once

#include "hopper/stream.h"
#include "ops/linear_attention/cuda/problem.h"

namespace tilewright::linear_attention::cuda {

template <class T>
struct PlainBackward {
  static constexpr int kColumns = 32;  // of the state that a block holds
  static constexpr int kMaxKeySize = 256;

  Rule rule;
  Decay decay;
  Sequences sequences;
  int heads, value_heads, key_size, value_size, tiles;  // tiles = ceil(value_size / kColumns)
  T scale;
  Rows<const T> q, k, v, beta, g, d_out;
  const T* initial_state;  // [N, HV, K, V], or by chunk as forward keeps states; null: zero
  bool initial_by_chunk;
  const T* d_final_state;  // [N, HV, K, V]

  // Scratch.
  T* errors;  // [B, T, HV, V]; delta rule
  T* dq_parts;  // [B, T, HV, tiles, K], and so the next two
  T* dk_read_parts;  // delta rule
  T* dk_write_parts;
  T* d_beta_parts;  // [B, T, HV, tiles]; delta rule
  T* d_states;  // [chunk_places, HV, K, V]; with a decay
  T* anchors;  // [chunk_places, HV, tiles, K]; with a decay

  // Results, contiguous.
  T* d_initial_state;  // [N, HV, K, V]
  T *dq, *dk;  // [B, T, HV, K]
  T* dv;  // [B, T, HV, V]
  T* d_beta;  // [B, T, HV]
  T* dg;  // [B, T, HV] or [B, T, HV, K]

  constexpr int64_t places() const {
    return chunk_places(sequences.count, sequences.tokens, sequences.offsets != nullptr);
  }
};

void launch_plain_backward(const PlainBackward<float>& problem, hopper::Stream stream);
void launch_plain_backward(const PlainBackward<double>& problem, hopper::Stream stream);

}  // namespace tilewright::linear_attention::cuda
