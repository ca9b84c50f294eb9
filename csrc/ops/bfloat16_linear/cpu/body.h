// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/lanes.h. Products and sums are rounded one by one: memory is the bound here.
#include "isa/lanes.h"
#include "ops/bfloat16_linear/kernels.h"

namespace tilewright::bfloat16_linear::TILEWRIGHT_LEVEL {
namespace {

constexpr int kTokensPerTile = 4;

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

}  // namespace

void rows(const Problem& p, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    int64_t m = 0;
    for (; m + kTokensPerTile <= p.m; m += kTokensPerTile) tile<kTokensPerTile>(p, n, m);
    for (; m < p.m; ++m) tile<1>(p, n, m);
  }
}

}  // namespace tilewright::bfloat16_linear::TILEWRIGHT_LEVEL
