// SPDX-License-Identifier: Apache-2.0
// What both matrix kernels share: decoding a word of weights, and turning sums into results.
#pragma once

#include "hopper/hopper.h"
#include "ops/ternary_linear/cuda/launch.h"

namespace tilewright::ternary_linear::cuda {

using format::TernaryMma2;

// The four registers of a 16 x 32 fragment, each four signed bytes of 64 w.
TILEWRIGHT_DEVICE void decode(uint32_t word, uint32_t (&fragment)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) fragment[i] = (word << (2 * i)) & TernaryMma2::kMask;
}

// Sums of 64 w x are multiples of 64: exact.
TILEWRIGHT_DEVICE int32_t unscaled(int32_t sum) { return sum >> TernaryMma2::kScaleBits; }

// Rows n and n + 1 of the result: a thread has both, for one token after the other.
struct RowPair {
  int64_t n;
  bool second;   // row n + 1 exists
  bool paired;   // both are one aligned store: N is even too
  bool biased;
  float scale[2], bias[2];
};

TILEWRIGHT_DEVICE RowPair row_pair(const Problem& p, int64_t n) {
  RowPair pair{n, n + 1 < p.n, n + 1 < p.n && p.n % 2 == 0, p.out.bias != nullptr, {0.0f, 0.0f}, {0.0f, 0.0f}};
  if (p.out.element == Element::kInt32) return pair;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = i == 0 || pair.second ? n + i : n;
    pair.scale[i] = p.out.weight_scales[row * p.out.weight_scale_step];
    if (pair.biased) pair.bias[i] = p.out.bias[row];
  }
  return pair;
}

TILEWRIGHT_DEVICE float finished(const RowPair& pair, int i, int32_t acc, float token_scale) {
  const float value = static_cast<float>(acc), scale = token_scale * pair.scale[i];
  return pair.biased ? fmaf(value, scale, pair.bias[i]) : value * scale;
}

// Two elements of four or two bytes, each alone or both at once.
TILEWRIGHT_DEVICE void put(uint32_t* y, const RowPair& pair, uint32_t first, uint32_t second) {
  if (pair.paired) {
    *reinterpret_cast<uint2*>(y) = make_uint2(first, second);
    return;
  }
  y[0] = first;
  if (pair.second) y[1] = second;
}
TILEWRIGHT_DEVICE void put(uint16_t* y, const RowPair& pair, uint32_t both) {
  if (pair.paired) {
    *reinterpret_cast<uint32_t*>(y) = both;
    return;
  }
  y[0] = static_cast<uint16_t>(both);
  if (pair.second) y[1] = static_cast<uint16_t>(both >> 16);
}

template <Element kElement>
TILEWRIGHT_DEVICE void store_pair(const Problem& p, const RowPair& pair, int64_t token, float token_scale,
                                  int32_t first, int32_t second) {
  const int64_t at = token * p.n + pair.n;
  if constexpr (kElement == Element::kInt32) {
    put(static_cast<uint32_t*>(p.out.y) + at, pair, static_cast<uint32_t>(first), static_cast<uint32_t>(second));
  } else {
    const float low = finished(pair, 0, first, token_scale), high = finished(pair, 1, second, token_scale);
    if constexpr (kElement == Element::kFloat) {
      put(static_cast<uint32_t*>(p.out.y) + at, pair, hopper::float_bits(low), hopper::float_bits(high));
    } else {
      const bool bfloat = kElement == Element::kBFloat16;
      put(static_cast<uint16_t*>(p.out.y) + at, pair,
          bfloat ? hopper::pack_bf16x2(low, high) : hopper::pack_f16x2(low, high));
    }
  }
}

// The same for an element that is known only now.
TILEWRIGHT_DEVICE void store_pair(const Problem& p, const RowPair& pair, int64_t token, int32_t first, int32_t second) {
  const float token_scale = p.out.element == Element::kInt32 ? 0.0f : p.out.token_scales[token];
  switch (p.out.element) {
    case Element::kInt32: return store_pair<Element::kInt32>(p, pair, token, token_scale, first, second);
    case Element::kFloat: return store_pair<Element::kFloat>(p, pair, token, token_scale, first, second);
    case Element::kBFloat16: return store_pair<Element::kBFloat16>(p, pair, token, token_scale, first, second);
    case Element::kHalf: return store_pair<Element::kHalf>(p, pair, token, token_scale, first, second);
  }
}

}  // namespace tilewright::ternary_linear::cuda
