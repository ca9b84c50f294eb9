// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI. Codes are two planes of signed bytes, high [Kp] then low [Kp]; weights are the unsigned operand, so
// a group's accumulator starts at -128 times the sum of its activations.
#include <immintrin.h>

#include "ops/int8_linear/cpu/prepare.h"
#include "ops/int8_linear/kernels.h"

namespace tilewright::int8_linear::avx512 {
namespace {

using format::Int8;

constexpr int kTokensPerTile = 4;
constexpr int64_t kPrefetchBytes = 1536;

TILEWRIGHT_INLINE __m512i broadcast(const uint8_t* at) {
  int32_t word;
  std::memcpy(&word, at, sizeof(word));
  return _mm512_set1_epi32(word);
}

template <int kTokens>
TILEWRIGHT_INLINE void tile(const Problem& p, int64_t b, int64_t m) {
  const format::Int8View& w = p.weight;
  const uint8_t* codes = w.block(b);
  const auto* scales = w.scales(b);
  const int64_t kp = w.padded_k();
  const uint8_t* x = p.x.codes + m * 2 * kp;
  const int32_t* sums = p.x.group_sums + m * w.groups;
  __m512 total[kTokens];
  for (auto& t : total) t = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i high[kTokens], low[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      high[t] = _mm512_setzero_si512();
      low[t] = _mm512_set1_epi32(-Int8::kZero * sums[t * w.groups + g]);
    }
#pragma GCC unroll 8
    for (int64_t s = g * Int8::kStepsPerGroup; s < (g + 1) * Int8::kStepsPerGroup; ++s) {
      const uint8_t* at = codes + s * Int8::kBytesPerStep;
      _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
      const __m512i weights = _mm512_loadu_si512(at);
      for (int t = 0; t < kTokens; ++t) {
        const uint8_t* word = x + t * 2 * kp + s * Int8::kColsPerStep;
        high[t] = _mm512_dpbusd_epi32(high[t], weights, broadcast(word));
        low[t] = _mm512_dpbusd_epi32(low[t], weights, broadcast(word + kp));
      }
    }
    const auto* at = reinterpret_cast<const __m256i*>(scales + g * Int8::kRowsPerBlock);
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(at));
    for (int t = 0; t < kTokens; ++t) {
      const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(high[t], 8), low[t]);
      total[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dot), total[t]);
    }
  }
  const int64_t n = b * Int8::kRowsPerBlock;
  const auto mask = static_cast<__mmask16>(w.n - n >= Int8::kRowsPerBlock ? 0xffff : (1u << (w.n - n)) - 1u);
  for (int t = 0; t < kTokens; ++t) {
    _mm512_mask_storeu_ps(p.y + (m + t) * p.y_stride + n, mask,
                          _mm512_mul_ps(total[t], _mm512_set1_ps(p.x.scales[m + t])));
  }
}

}  // namespace

void blocks(const Problem& p, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    int64_t m = 0;
    for (; m + kTokensPerTile <= p.m; m += kTokensPerTile) tile<kTokensPerTile>(p, b, m);
    for (; m < p.m; ++m) tile<1>(p, b, m);
  }
}

float prepare(const float* x, int64_t k, uint8_t* codes, int32_t* group_sums) {
  using ByteLanes = int8_t __attribute__((vector_size(16)));
  const int64_t kp = round_up(k, Int8::kGroup);
  return prepare_token(x, k, group_sums, [codes, kp](int64_t i, const IntLanes& lanes) {
    const IntLanes upper = (lanes + 128) >> 8;
    const ByteLanes high = __builtin_convertvector(upper, ByteLanes);
    const ByteLanes low = __builtin_convertvector(lanes - (upper << 8), ByteLanes);
    std::memcpy(codes + i, &high, sizeof(high));
    std::memcpy(codes + kp + i, &low, sizeof(low));
  });
}

}  // namespace tilewright::int8_linear::avx512
