// SPDX-License-Identifier: Apache-2.0
// AVX2: weights widened to 16 bits, exact 16-bit products. Codes are int16 [Kp].
#include <immintrin.h>

#include "ops/int8_linear/cpu/prepare.h"
#include "ops/int8_linear/kernels.h"

namespace tilewright::int8_linear::avx2 {
namespace {

using format::Int8;

constexpr int kQuarters = 4;  // a vector is four times 4 rows x 4 columns

struct Sums {
  __m256i quarter[kQuarters];  // [4 rows][2 column pairs]
};

// Rows' two column pairs added, in row order, as float: half 0 is rows 0..7, half 1 rows 8..15.
__m256 rows(const Sums& sums, int half) {
  const __m256i pairs = _mm256_hadd_epi32(sums.quarter[2 * half], sums.quarter[2 * half + 1]);
  return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(pairs, 0xd8));
}

// 16 rows of a block, those of one vector, times one token.
void one(const Problem& p, int64_t b, int vector, int64_t m) {
  const format::Int8View& w = p.weight;
  const int64_t n = b * Int8::kRowsPerBlock + vector * Int8::kRowsPerVector;
  const auto* x = reinterpret_cast<const int16_t*>(p.x.codes) + m * w.padded_k();
  const __m256i zero = _mm256_set1_epi16(Int8::kZero);
  __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* chunk = w.chunk(b, g);
    const uint8_t* codes = chunk + vector * Int8::kBytesPerVector;
    Sums sums{};
    for (int64_t s = 0; s < Int8::kStepsPerGroup; ++s) {
      int64_t word;
      std::memcpy(&word, x + g * Int8::kGroup + s * Int8::kColsPerStep, sizeof(word));
      const __m256i activation = _mm256_set1_epi64x(word);
      for (int q = 0; q < kQuarters; ++q) {
        const auto* at = reinterpret_cast<const __m128i*>(codes + s * Int8::kBytesPerStep + q * 16);
        const __m256i weights = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(at)), zero);
        sums.quarter[q] = _mm256_add_epi32(sums.quarter[q], _mm256_madd_epi16(weights, activation));
      }
    }
    const uint8_t* scales = chunk + Int8::kScalesAt + vector * Int8::kRowsPerVector * 2;
    for (int half = 0; half < 2; ++half) {
      const auto* at = reinterpret_cast<const __m128i*>(scales + half * 16);
      total[half] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128(at)), rows(sums, half), total[half]);
    }
  }
  const __m256 scale = _mm256_set1_ps(p.x.scales[m]);
  alignas(32) float out[Int8::kRowsPerVector];
  for (int half = 0; half < 2; ++half) _mm256_store_ps(out + half * 8, _mm256_mul_ps(total[half], scale));
  const int64_t valid = w.n - n < Int8::kRowsPerVector ? w.n - n : Int8::kRowsPerVector;
  if (valid > 0) std::memcpy(p.y + m * p.y_stride + n, out, static_cast<size_t>(valid) * sizeof(float));
}

}  // namespace

void blocks(const Problem& p, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    for (int64_t m = 0; m < p.m; ++m) {
      for (int vector = 0; vector < 2; ++vector) one(p, b, vector, m);
    }
  }
}

float prepare(const float* x, int64_t k, uint8_t* codes, int32_t* group_sums) {
  auto* out = reinterpret_cast<int16_t*>(codes);
  return prepare_token(x, k, group_sums, [out](int64_t i, const IntLanes& lanes) {
    using ShortLanes = int16_t __attribute__((vector_size(32)));
    const ShortLanes narrow = __builtin_convertvector(lanes, ShortLanes);
    std::memcpy(out + i, &narrow, sizeof(narrow));
  });
}

}  // namespace tilewright::int8_linear::avx2
