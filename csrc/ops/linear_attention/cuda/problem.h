// SPDX-License-Identifier: Apache-2.0
// Linear attention on the device, as plain data. In is the type that inputs are stored in, T that of the arithmetic, of
// gates and of states: double for double, else float. Every pointer is a device pointer, offsets too: the host knows
// how many sequences there are, not where they lie, and sizes grids and buffers by what can occur at most.
//
// Both directions treat kChunk tokens at once. A chunk of a sequence has a place of its own in every buffer that is kept
// by chunk, `chunk_place`; places that no chunk has are never read.
#pragma once

#include "ops/linear_attention/problem.h"

// Defined by hopper/types.h for kernels; the host only passes pointers to them on.
namespace tilewright::hopper {
struct bf16;
struct f16;
}  // namespace tilewright::hopper

namespace tilewright::linear_attention::cuda {

inline constexpr int kChunk = 64;

constexpr int64_t chunks_of(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

// Places for every chunk of `count` sequences that together have at most `tokens` tokens (each, if they are not packed).
constexpr int64_t chunk_places(int64_t count, int64_t tokens, bool packed) {
  return packed ? tokens / kChunk + count : count * chunks_of(tokens);
}

// Tokens [first, first + tokens) of batch row `batch`; `place` is that of its first chunk, the next ones follow.
struct Sequence {
  int64_t batch, first, tokens, place;
};

// Offsets that fall, or that end behind the last token, would be read out of bounds: they are cut off.
constexpr Sequence sequence_of(const Sequences& all, int64_t n) {
  if (all.offsets == nullptr) return {n, 0, all.tokens, n * chunks_of(all.tokens)};
  int64_t first = all.offsets[n], last = all.offsets[n + 1];
  first = first < 0 ? 0 : first > all.tokens ? all.tokens : first;
  last = last < first ? first : last > all.tokens ? all.tokens : last;
  // floor(first / C) + n: the sequence before, of ceil(tokens / C) chunks, ends at or below it.
  return {0, first, last - first, first / kChunk + n};
}

// The chunk at a place: sequence n and tokens [first, first + rows) of it, rows = 0 where there is none.
struct Chunk {
  int64_t n, batch, first;
  int rows;
};

constexpr Chunk chunk_at(const Sequences& all, int64_t place) {
  int64_t n = 0;
  if (all.offsets == nullptr) {
    n = place / chunks_of(all.tokens);
  } else {
    // The last sequence that begins at or before the place.
    int64_t above = all.count;
    while (above - n > 1) {
      const int64_t middle = (n + above) / 2;
      (sequence_of(all, middle).place <= place ? n : above) = middle;
    }
  }
  const Sequence s = sequence_of(all, n);
  const int64_t first = (place - s.place) * kChunk, left = s.tokens - first;
  return {n, s.batch, s.first + first, static_cast<int>(left <= 0 ? 0 : left < kChunk ? left : kChunk)};
}

template <class In, class T>
struct Problem {
  Rule rule;
  Decay decay;
  Sequences sequences;
  int64_t heads, value_heads, key_size, value_size;
  T scale;
  Rows<const In> q, k;  // [B, T, H, K]
  Rows<const In> v;  // [B, T, HV, V]
  Rows<const T> beta;  // [B, T, HV]; not read by the additive rule
  Rows<const T> g;  // [B, T, HV] or [B, T, HV, K], natural logarithms; not read without decay
  Rows<In> out;  // [B, T, HV, V]
  const T* initial;  // [N or P, HV, K, V]; null: zero
  T* state;  // [N or P, HV, K, V], after the last tokens; may be `initial`
  const int64_t* slots;  // [N]: the row of initial and state that each sequence owns; null: row n
  int64_t slot_count;  // P; a sequence whose slot is not one of them gets NaN, and no state is touched

  constexpr int64_t state_size() const { return key_size * value_size; }
  constexpr int64_t key_head(int64_t head) const { return head / (value_heads / heads); }
};

}  // namespace tilewright::linear_attention::cuda
