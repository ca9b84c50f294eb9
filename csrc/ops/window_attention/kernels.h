// SPDX-License-Identifier: Apache-2.0
// Causal softmax attention over the last W tokens, the query's own included, from a ring that holds just these: its size
// does not depend on the position. One key head of one sequence; token after token:
//
//   the row of token p - W, which p takes over, is handed out where asked for; then k and v of p are written
//   l_j = scale q . k_j for p - W < j <= p,  c = max l,  w_j = exp(l_j - c)
//   out = sum w_j v_j / sum w_j, or both sums side by side, for a denominator that others share
//
// Sums run over the ring's rows, so they depend on the position alone and not on how a text is cut into calls.
#pragma once

#include <cstdint>

#include "core/memory.h"
#include "isa/isa.h"

namespace tilewright::window_attention {

inline constexpr int64_t kRowLanes = 16;

// Keys are kept by column, so that a query meets the rows of the ring side by side.
constexpr int64_t padded_rows(int64_t window) { return round_up(window, kRowLanes); }
constexpr int64_t ring_floats(int64_t window, int64_t key_size, int64_t value_size) {
  return padded_rows(window) * key_size + window * value_size;
}

struct Problem {
  int64_t window, heads, key_size, value_size;  // heads: of queries, for this key head
  float scale;
  bool normalize;  // divide; otherwise out has the sum of weights behind each head's values
  float* keys;  // [key_size, padded_rows(window)]
  float* values;  // [window, value_size]
  int64_t position;  // of the first token
  int64_t tokens;
  const float* q;  // rows [heads, key_size]
  const float* k;  // rows [key_size]
  const float* v;  // rows [value_size]
  float* out;  // rows [heads, value_size or value_size + 1]
  float* k_leaving;  // rows [key_size]; token p gets that of p - W, where there is one; may be k, or null
  float* v_leaving;  // rows [value_size], likewise
  int64_t q_stride, k_stride, v_stride, out_stride, k_leaving_stride, v_leaving_stride;  // of rows
  float* weights;  // [padded_rows(window)], scratch
};

using Attend = void (*)(const Problem&);

namespace generic {
void attend(const Problem&);
}
namespace avx2 {
void attend(const Problem&);
}
namespace avx512 {
void attend(const Problem&);
}

inline Attend kernel() {
#if defined(__x86_64__)
  static constexpr isa::Table<Attend> table{{generic::attend, avx2::attend, avx512::attend, avx512::attend}};
  return table.pick();
#else
  return generic::attend;
#endif
}

}  // namespace tilewright::window_attention
