// SPDX-License-Identifier: Apache-2.0
// AVX2: codes 0, 1, 2 are the unsigned operand of vpmaddubsw, activations the signed one.
#include "isa/vec_avx2.h"
#include "ops/ternary_linear/cpu/vector_common.h"

namespace tilewright::ternary_linear::avx2 {
namespace {

// A pair of products is between 2 * 2 * -128 = -512 and 2 * 2 * 127 = 508, so a 16-bit lane takes 64 pairs and not one
// more: 64 * -512 is the least int16. A step adds one pair a plane.
constexpr int kPairsPerWiden = 64;
constexpr int64_t kStepsPerWiden = kPairsPerWiden / TernaryQ2::kPlanes;
static_assert(kPairsPerWiden * -512 >= INT16_MIN && kPairsPerWiden * 508 <= INT16_MAX, "widen earlier");

constexpr int kTokens = 3;
constexpr int kRows = 8;     // of a register
constexpr int kHalves = 2;   // registers of a tile of 16 rows

inline __m256i load(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// One tile of 16 rows and one plane: 32 columns by kCount tokens added to the 16-bit sums.
template <int kPlane, int kCount>
inline __attribute__((always_inline)) void add_plane(const __m256i* raw, const int8_t* x, int64_t stride,
                                                     __m256i (&narrow)[kCount][kHalves]) {
  const __m256i digit = _mm256_set1_epi8(format::Ternary2::kInvalidDigit);
  __m256i codes[kHalves];
  for (int h = 0; h < kHalves; ++h) codes[h] = _mm256_and_si256(_mm256_srli_epi16(raw[h], 2 * kPlane), digit);
  for (int t = 0; t < kCount; ++t) {
    const __m256i word = _mm256_set1_epi32(four_codes(x + t * stride + kPlane * TernaryQ2::kColsPerPlane));
    for (int h = 0; h < kHalves; ++h) {
      narrow[t][h] = _mm256_add_epi16(narrow[t][h], _mm256_maddubs_epi16(codes[h], word));
    }
  }
}

template <int kCount>
void tile(const Problem& p, int64_t m, int64_t block, int64_t tile_index) {
  const int64_t steps = TernaryQ2::steps(p.weight.k);
  const int64_t first_row = block * TernaryQ2::kRowsPerBlock + tile_index * TernaryQ2::kRowsPerTile;
  const uint8_t* weight =
      p.weight.payload + block * steps * TernaryQ2::kBytesPerStep + tile_index * TernaryQ2::kBytesPerTile;
  const int8_t* x = p.x + m * p.x_stride;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i wide[kCount][kHalves];
  for (int t = 0; t < kCount; ++t) {
    for (int h = 0; h < kHalves; ++h) wide[t][h] = _mm256_set1_epi32(-p.sums[m + t]);
  }
  for (int64_t begin = 0; begin < steps; begin += kStepsPerWiden) {
    const int64_t end = std::min(steps, begin + kStepsPerWiden);
    __m256i narrow[kCount][kHalves];
    for (int t = 0; t < kCount; ++t) {
      for (int h = 0; h < kHalves; ++h) narrow[t][h] = _mm256_setzero_si256();
    }
    for (int64_t s = begin; s < end; ++s) {
      const uint8_t* at = weight + s * TernaryQ2::kBytesPerStep;
      const int8_t* columns = x + s * TernaryQ2::kColsPerStep;
      const __m256i raw[kHalves] = {load(at), load(at + 32)};
      add_plane<0, kCount>(raw, columns, p.x_stride, narrow);
      add_plane<1, kCount>(raw, columns, p.x_stride, narrow);
      add_plane<2, kCount>(raw, columns, p.x_stride, narrow);
      add_plane<3, kCount>(raw, columns, p.x_stride, narrow);
    }
    for (int t = 0; t < kCount; ++t) {
      for (int h = 0; h < kHalves; ++h) {
        wide[t][h] = _mm256_add_epi32(wide[t][h], _mm256_madd_epi16(narrow[t][h], ones));
      }
    }
  }
  for (int t = 0; t < kCount; ++t) {
    for (int h = 0; h < kHalves; ++h) {
      const int64_t row = first_row + h * kRows;
      if (row >= p.weight.n) break;
      auto* at = reinterpret_cast<float*>(p.acc) + (m + t) * p.acc_stride + row;
      Vec8::store_first(at, Vec8::from_bits(wide[t][h]), p.weight.n - row);
    }
  }
}

}  // namespace

void q2_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  const int64_t blocks = plan.rows_per_item / TernaryQ2::kRowsPerBlock;
  const int64_t end = std::min(ceil_div(p.weight.n, TernaryQ2::kRowsPerBlock), last * blocks);
  for (int64_t b = first * blocks; b < end; ++b) {
    for (int64_t i = 0; i < TernaryQ2::kTilesPerBlock; ++i) {
      if (b * TernaryQ2::kRowsPerBlock + i * TernaryQ2::kRowsPerTile >= p.weight.n) break;
      each_token_tile<kTokens>(p.m, [&](int64_t m, auto count) { tile<count.value>(p, m, b, i); });
    }
  }
}

void quantize(const float* x, int64_t k, int8_t* codes, float* scale, int32_t* sum) {
  vector_quantize<Vec8>(x, k, codes, scale, sum);
}

// In 32 bits throughout: |sum| <= 128 K.
int32_t sum(const int8_t* codes, int64_t count) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += kColsPerStep) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    total = _mm256_add_epi32(total, _mm256_madd_epi16(words, ones));
  }
  return Vec8::reduce_addi(total);
}

void finish(const Epilogue& e, int64_t first, int64_t last) { vector_finish<Vec8>(e, first, last); }

}  // namespace tilewright::ternary_linear::avx2
