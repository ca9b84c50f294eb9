// SPDX-License-Identifier: Apache-2.0
// Linear attention with a matrix state, as plain data. For each token of a sequence and each value head:
//
//   S <- diag(exp(g)) S                          decay, before anything reads or writes
//   S <- S + k v^T                               Rule::kAdditive
//   S <- S + k (beta (v - S^T k))^T              Rule::kDelta
//   o  = scale S^T q                             read, after the write
//
// S [K, V]; value head j reads query and key head j / (value_heads / heads). T is float or double: inputs, arithmetic and
// states alike; narrower inputs are widened before they come here.
#pragma once

#include <cstdint>

namespace tilewright::linear_attention {

enum class Rule { kAdditive, kDelta };
enum class Decay {
  kNone,
  kToken,
  kChannel
};  // none, one number a token (or a constant: token stride 0), one a channel

// Rows of adjacent elements at any strides, counted in elements.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;

  constexpr T* row(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

// Sequence n is tokens [first, last) of batch row b. offsets null: every batch row is one sequence.
struct Sequences {
  int64_t count;
  int64_t tokens;
  const int64_t* offsets;

  int64_t batch(int64_t n) const { return offsets == nullptr ? n : 0; }
  int64_t first(int64_t n) const { return offsets == nullptr ? 0 : offsets[n]; }
  int64_t last(int64_t n) const { return offsets == nullptr ? tokens : offsets[n + 1]; }
};

template <class T>
struct Problem {
  Rule rule;
  Decay decay;
  Sequences sequences;
  int64_t heads, value_heads, key_size, value_size;
  T scale;
  Rows<const T> q, k;  // [B, T, H, K]
  Rows<const T> v;  // [B, T, HV, V]
  Rows<const T> beta;  // [B, T, HV], rows of one element; not read by the additive rule
  Rows<const T> g;  // [B, T, HV] or [B, T, HV, K], natural logarithms; not read without decay
  Rows<T> out;  // [B, T, HV, V]
  T* state;  // [P, HV, K, V], read at the start and written at the end
  const int64_t* slots;  // [N]: the row of state that each sequence owns; null: row n
  int64_t parts = 1;  // tasks that share the value columns of a head
  int64_t band = 1;  // adjacent value heads that one task of the chunk form takes; with parts > 1 it is 1

  // Chunk form only, for the backward pass; null: not kept.
  T* checkpoints = nullptr;  // [all segments, HV, K, V]: the states before every kSegment-th chunk
  const int64_t* first_segment = nullptr;  // [N + 1]
  Rows<T> errors{};  // [B, T, HV, V]: of the delta rule, u / beta

  int64_t slot(int64_t n) const { return slots == nullptr ? n : slots[n]; }
  int64_t state_size() const { return key_size * value_size; }
};

// Gradients. q and k come once for every value head: heads of a group are added by the caller, in a fixed order.
template <class T>
struct Gradients {
  Rows<const T> d_out;  // [B, T, HV, V]
  T* d_state;  // [N, HV, K, V]: of the final state when the run begins, of the initial state when it ends
  Rows<T> dq, dk;  // [B, T, HV, K]
  Rows<T> dv;  // [B, T, HV, V]
  Rows<T> dbeta;  // [B, T, HV]; null for the additive rule
  Rows<T> dg;  // [B, T, HV] or [B, T, HV, K]; null without decay
};

// Tokens that the chunk form treats at once. With a decay a channel, half: its decays sit inside the products.
constexpr int64_t chunk_tokens(Decay decay) { return decay == Decay::kChannel ? 16 : 32; }

// Chunks between two kept states: the backward pass recomputes the states in between.
inline constexpr int64_t kSegment = 8;
constexpr int64_t segment_tokens(Decay decay) { return kSegment * chunk_tokens(decay); }

}  // namespace tilewright::linear_attention
