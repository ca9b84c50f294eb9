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
constexpr int kVectors = Int8::kRowsPerBlock / Int8::kRowsPerVector;  // side by side: a broadcast serves both
constexpr int64_t kPrefetchBytes = 512;

TILEWRIGHT_INLINE __m512i broadcast(const uint8_t* at) {
  int32_t word;
  std::memcpy(&word, at, sizeof(word));
  return _mm512_set1_epi32(word);
}

template <int kTokens>
TILEWRIGHT_INLINE void store(const Problem& p, int64_t b, int64_t m, const __m512 (&total)[kTokens][kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t n = b * Int8::kRowsPerBlock + v * Int8::kRowsPerVector;
    const int64_t rows = p.weight.n - n;
    if (rows <= 0) return;
    const auto mask = static_cast<__mmask16>(rows >= Int8::kRowsPerVector ? 0xffff : (1u << rows) - 1u);
    for (int t = 0; t < kTokens; ++t) {
      _mm512_mask_storeu_ps(p.y + (m + t) * p.y_stride + n, mask,
                            _mm512_mul_ps(total[t][v], _mm512_set1_ps(p.x.scales[m + t])));
    }
  }
}

template <int kTokens>
TILEWRIGHT_INLINE void tile(const Problem& p, int64_t b, int64_t m) {
  const format::Int8View& w = p.weight;
  const uint8_t* at = w.block(b);
  const int64_t kp = w.padded_k();
  const uint8_t* x = p.x.codes + m * 2 * kp;
  const int32_t* sums = p.x.group_sums + m * w.groups;
  __m512 total[kTokens][kVectors];
  for (auto& row : total)
    for (auto& t : row) t = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i high[kTokens][kVectors], low[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) {
        high[t][v] = _mm512_setzero_si512();
        low[t][v] = _mm512_set1_epi32(-Int8::kZero * sums[t * w.groups + g]);
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < Int8::kStepsPerGroup; ++s, at += Int8::kBytesPerStep, x += Int8::kColsPerStep) {
      __m512i weights[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        _mm_prefetch(reinterpret_cast<const char*>(at + v * Int8::kBytesPerVector + kPrefetchBytes), _MM_HINT_T0);
        weights[v] = _mm512_loadu_si512(at + v * Int8::kBytesPerVector);
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m512i upper = broadcast(x + t * 2 * kp), lower = broadcast(x + t * 2 * kp + kp);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          high[t][v] = _mm512_dpbusd_epi32(high[t][v], weights[v], upper);
          low[t][v] = _mm512_dpbusd_epi32(low[t][v], weights[v], lower);
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const auto* scales = reinterpret_cast<const __m256i*>(at) + v;
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales));
      for (int t = 0; t < kTokens; ++t) {
        const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(high[t][v], 8), low[t][v]);
        total[t][v] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dot), total[t][v]);
      }
    }
    at += Int8::kChunkBytes - Int8::kScalesAt;
  }
  store<kTokens>(p, b, m, total);
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
