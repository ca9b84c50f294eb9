// SPDX-License-Identifier: Apache-2.0
// What the chunk form computes for each chunk and value head before the states go through the chunks. Tiles are stored
// as they lie in shared memory, swizzled, so that one bulk copy brings each.
//
//   inverse  [C, C]  (I + A diag(beta))^-1, A_ij = k_i . k_j exp(G_i - G_j) for i > j    delta rule
//
// beta is 1 for the additive rule and 0 for tokens behind a sequence's end, where g is 0: G stays what it was. With a
// decay a channel the decays are inside the keys and queries themselves:
//
//   scores   [C, C]  scale sum_d q_id k_jd exp(G_id - G_jd) beta_j for i >= j
//   reads    [C, K]  k_i exp(G_i)                                                        delta rule
//   queries  [C, K]  scale q_i exp(G_i)
//   writes   [C, K]  k_i exp(G_n - G_i)
//   factors  [C] beta, [K] exp(G_n)
#pragma once

#include "core/memory.h"
#include "ops/linear_attention/cuda/problem.h"

namespace tilewright::linear_attention::cuda {

inline constexpr int kSquareBytes = kChunk * kChunk * 2;

// Keys of a tile: K rounded up to what a kernel is compiled for; 0 where none is.
constexpr int tile_keys(int64_t key_size) {
  return key_size <= 64 ? 64 : key_size <= 128 ? 128 : key_size <= 256 ? 256 : 0;
}

struct Prepared {
  char* inverse;  // [chunk_places, HV] tiles; null where there are none
  char* scores;
  float* factors;
  char *reads, *queries, *writes;
  int factor_count;  // floats a chunk and head
  int key_tile_bytes;

  constexpr char* square(char* tiles, int64_t index) const { return tiles + index * kSquareBytes; }
  constexpr char* keys(char* tiles, int64_t index) const { return tiles + index * key_tile_bytes; }
  constexpr float* row(int64_t index) const { return factors + index * factor_count; }
};

// Lays the buffers out in one piece of memory; with a null pointer it only counts the bytes.
inline int64_t place_buffers(Rule rule, Decay decay, int64_t key_size, int64_t tiles, char* memory, Prepared& to) {
  const int keys = tile_keys(key_size);
  to = {};
  to.factor_count = kChunk + keys;
  to.key_tile_bytes = kChunk * keys * 2;
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* piece = memory == nullptr ? nullptr : memory + used;
    used += round_up(bytes, 1024);
    return piece;
  };
  if (rule == Rule::kDelta) to.inverse = take(tiles * kSquareBytes);
  if (decay == Decay::kChannel) {
    to.scores = take(tiles * kSquareBytes);
    if (rule == Rule::kDelta) to.reads = take(tiles * to.key_tile_bytes);
    to.queries = take(tiles * to.key_tile_bytes);
    to.writes = take(tiles * to.key_tile_bytes);
    char* factors = take(tiles * to.factor_count * static_cast<int64_t>(sizeof(float)));
    to.factors = reinterpret_cast<float*>(factors);
  }
  return used;
}

}  // namespace tilewright::linear_attention::cuda
