// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/lanes.h. Products and sums are rounded one by one: memory is the bound here.
#include <algorithm>

#include "core/memory.h"
#include "isa/lanes.h"
#include "ops/bfloat16_linear/kernels.h"

namespace tilewright::bfloat16_linear::TILEWRIGHT_LEVEL {
namespace {

constexpr int kTokensPerTile = 4;
constexpr int64_t kBytesAhead = 4096;   // between a listed row and the one that is asked for meanwhile

TILEWRIGHT_INLINE Lanes load_bfloat16(const uint16_t* p) {
  using ShortLanes = uint16_t __attribute__((vector_size(32)));
  using WordLanes = uint32_t __attribute__((vector_size(64)));
  ShortLanes half;
  std::memcpy(&half, p, sizeof(half));
  const WordLanes bits = __builtin_convertvector(half, WordLanes) << 16;
  Lanes v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

template <int kTokens>
TILEWRIGHT_INLINE void tile(const Problem& p, int64_t n, int64_t m) {
  const format::BFloat16View& w = p.weight;
  const uint16_t* weights = w.row(n);
  Lanes even[kTokens] = {}, odd[kTokens] = {};
  for (int64_t k = 0; k < w.padded_k; k += 2 * kLanes) {
    const Lanes first = load_bfloat16(weights + k), second = load_bfloat16(weights + k + kLanes);
    for (int t = 0; t < kTokens; ++t) {
      const float* x = p.x + (m + t) * w.padded_k + k;
      even[t] += first * load_lanes(x);
      odd[t] += second * load_lanes(x + kLanes);
    }
  }
  for (int t = 0; t < kTokens; ++t) p.y[(m + t) * p.y_stride + n] = sum_lanes(even[t] + odd[t]);
}

// y[0..kRows) of one token. A line of `ahead` is asked for with each line of a row that is read: no hardware prefetcher
// sees which rows come.
template <int kRows>
TILEWRIGHT_INLINE void listed_tile(const Problem& p, const int32_t* list, const int32_t* ahead, float* y) {
  const format::BFloat16View& w = p.weight;
  const uint16_t* weights[kRows];
  const uint16_t* next[kRows];
  for (int r = 0; r < kRows; ++r) {
    weights[r] = w.row(list[r]);
    next[r] = w.row(ahead[r]);
  }
  Lanes even[kRows] = {}, odd[kRows] = {};
  for (int64_t k = 0; k < w.padded_k; k += 2 * kLanes) {
    const Lanes first = load_lanes(p.x + k), second = load_lanes(p.x + k + kLanes);
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(next[r] + k, 0, 2);
      even[r] += load_bfloat16(weights[r] + k) * first;
      odd[r] += load_bfloat16(weights[r] + k + kLanes) * second;
    }
  }
  for (int r = 0; r < kRows; ++r) y[r] = sum_lanes(even[r] + odd[r]);
}

}  // namespace

void rows(const Problem& p, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    int64_t m = 0;
    for (; m + kTokensPerTile <= p.m; m += kTokensPerTile) tile<kTokensPerTile>(p, n, m);
    for (; m < p.m; ++m) tile<1>(p, n, m);
  }
}

void listed_rows(const Problem& p, const int32_t* list, int64_t count) {
  constexpr int64_t kRows = 2;
  const int64_t row_bytes = p.weight.padded_k * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t distance = round_up(ceil_div(kBytesAhead, row_bytes), kRows);
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    listed_tile<kRows>(p, list + i, list + std::min(i + distance, count - kRows), p.y + i);
  }
  if (i < count) listed_tile<1>(p, list + i, list + i, p.y + i);
}

}  // namespace tilewright::bfloat16_linear::TILEWRIGHT_LEVEL
