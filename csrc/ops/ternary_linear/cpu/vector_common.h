// SPDX-License-Identifier: Apache-2.0
// What the vector levels share, over any vector width. Everything is in an unnamed namespace, for the reason given in
// isa/vec_avx512.h.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "ops/ternary_linear/activation.h"
#include "ops/ternary_linear/kernels.h"

namespace tilewright::ternary_linear {
namespace {

using format::TernaryQ2;

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// Calls tile(m, constant) over all tokens in tiles of kMost, then once for the rest.
template <int kMost, class Tile>
inline __attribute__((always_inline)) void each_token_tile(int64_t tokens, const Tile& tile) {
  int64_t m = 0;
  for (; m + kMost <= tokens; m += kMost) tile(m, Int<kMost>{});
  const auto rest = [&](auto& self, auto size) -> void {
    if constexpr (size.value > 0) {
      if (tokens - m == size.value) return tile(m, size);
      self(self, Int<size.value - 1>{});
    }
  };
  rest(rest, Int<kMost - 1>{});
}

inline int32_t four_codes(const int8_t* at) {
  int32_t word;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

// Weights are one forward stream; asked for a little ahead of the hardware prefetcher, which stops at each page.
constexpr int64_t kPrefetchBytes = 2048;
inline void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

template <class V>
void vector_quantize(const float* x, int64_t k, int8_t* codes, float* scale, int32_t* sum) {
  auto largest = V::set1i(0);
  for (int64_t i = 0; i < k; i += V::kLanes) {
    const auto bits = V::bits(i + V::kLanes <= k ? V::load(x + i) : V::load_first(x + i, k - i));
    largest = V::maxu(largest, V::andi(bits, V::set1i(0x7fffffff)));
  }
  const uint32_t bits = V::reduce_maxu(largest);
  const int64_t padded = round_up(k, kColsPerStep);
  *sum = 0;
  if (bits >= 0x7f800000u) {  // an infinity or a NaN
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::memset(codes, 0, static_cast<size_t>(padded));
    return;
  }
  float absmax;
  std::memcpy(&absmax, &bits, sizeof(absmax));
  *scale = (absmax > kLeastAbsmax ? absmax : kLeastAbsmax) / kInt8Limit;
  auto total = V::set1i(0);
  for (int64_t i = 0; i < padded; i += V::kLanes) {
    const auto value = i + V::kLanes <= k ? V::load(x + i) : V::load_first(x + i, k > i ? k - i : 0);
    const auto code = V::to_int(V::div(value, V::set1(*scale)));
    V::store_int8(codes + i, code);
    total = V::addi(total, code);
  }
  *sum = V::reduce_addi(total);
}

template <class V>
void vector_finish(const Epilogue& e, int64_t first, int64_t last) {
  for (int64_t m = 0; m < e.m; ++m) {
    const auto token = V::set1(e.token_scales[m]);
    for (int64_t n = first; n < last; n += V::kLanes) {
      const int64_t rows = last - n;
      const auto weight = e.scale_per_row ? V::load_first(e.weight_scales + n, rows) : V::set1(e.weight_scales[0]);
      const auto bits = V::load_first(reinterpret_cast<const float*>(e.acc) + m * e.stride + n, rows);
      const auto acc = V::to_float(V::bits(bits));
      const auto scale = V::mul(token, weight);
      const bool bias = e.bias != nullptr;
      V::store_first(e.y + m * e.stride + n,
                     bias ? V::fma(acc, scale, V::load_first(e.bias + n, rows)) : V::mul(acc, scale), rows);
    }
  }
}

}  // namespace
}  // namespace tilewright::ternary_linear
