// SPDX-License-Identifier: Apache-2.0
// AVX2: u4 x s8 products in 16-bit lanes (vpmaddubsw), widened once every four steps.
#include "isa/vec_avx2.h"
#include "ops/int4_linear/cpu/vector_fp8.h"

namespace tilewright::int4_linear::avx2 {
namespace {

using V = Vec8;

// A 16-bit lane takes two products a multiply, two multiplies a step.
constexpr int kStepsPerWiden = 4;
static_assert(kStepsPerWiden * 2 * 2 * Int4::kMaxCode * 128 <= INT16_MAX, "widen earlier");

__m256i broadcast4(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return _mm256_set1_epi32(word);
}

template <ScaleType kScale, OffsetKind kOffset, int kTokens>
void int8_tile(const Problem& p, int64_t m, int64_t b, int first_row) {
  const Int4View& w = p.weight;
  const auto* x = static_cast<const int8_t*>(p.x.codes) + m * w.padded_k();
  const auto* sums = static_cast<const int32_t*>(p.x.group_sums) + m * w.groups;
  const __m256i nibble = _mm256_set1_epi8(Int4::kMaxCode);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 total[kTokens], part[kTokens];
  for (int t = 0; t < kTokens; ++t) total[t] = part[t] = V::zero();
  each_run(
      p, m,
      [&](int64_t g) {
        const uint8_t* packed = w.codes(b, g);
        const uint8_t* scales = w.scales(b, g);
        const uint8_t* offsets = w.offsets(b, g);
        __m256i zero = _mm256_set1_epi32(kOffset == OffsetKind::kSymmetric ? Int4::kSymmetricZero : 0);
        if constexpr (kOffset == OffsetKind::kZeroPoint) zero = V::load_zero_points(offsets + first_row);
        __m256i wide[kTokens];
        for (int t = 0; t < kTokens; ++t) {
          wide[t] = V::subi(_mm256_setzero_si256(), V::muli(zero, V::set1i(sums[t * w.groups + g])));
        }
        const int8_t* x_group = x + g * w.group;
        const int64_t end = w.group_steps(g);
        for (int64_t s = 0; s < end; s += kStepsPerWiden) {
          __m256i narrow[kTokens];
          for (auto& t : narrow) t = _mm256_setzero_si256();
          for (int64_t step = s; step < std::min(end, s + kStepsPerWiden); ++step) {
            const __m256i codes = V::loadi(packed + step * Int4::kBytesPerStep + first_row * 4);
            const __m256i low = _mm256_and_si256(codes, nibble);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
            for (int t = 0; t < kTokens; ++t) {
              const int8_t* at = x_group + t * w.padded_k() + step * Int4::kColsPerStep;
              narrow[t] = _mm256_add_epi16(narrow[t], _mm256_maddubs_epi16(low, broadcast4(at)));
              narrow[t] = _mm256_add_epi16(narrow[t], _mm256_maddubs_epi16(high, broadcast4(at + 4)));
            }
          }
          for (int t = 0; t < kTokens; ++t) wide[t] = V::addi(wide[t], _mm256_madd_epi16(narrow[t], ones));
        }
        const __m256 scale = V::load_scales<kScale>(scales, first_row);
        for (int t = 0; t < kTokens; ++t) {
          part[t] = V::fma(scale, V::to_float(wide[t]), part[t]);
          if constexpr (kOffset == OffsetKind::kMinimum) {
            const __m256 minimum = V::load_scales<kScale>(offsets, first_row);
            part[t] = V::fma(minimum, V::set1(static_cast<float>(sums[t * w.groups + g])), part[t]);
          }
        }
      },
      [&](const auto& scale) {
        for (int t = 0; t < kTokens; ++t) {
          total[t] = V::fma(V::set1(scale(t)), part[t], total[t]);
          part[t] = V::zero();
        }
      });
  for (int t = 0; t < kTokens; ++t) finish<V>(p, m + t, b * Int4::kRowsPerBlock + first_row, total[t]);
}

}  // namespace

void int8_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  constexpr int kTokens = 3;
  with_format(p.weight, [&](auto scale, auto offset) {
    const int64_t end = std::min(p.weight.blocks, last * plan.blocks_per_item);
    for (int64_t b = first * plan.blocks_per_item; b < end; ++b) {
      each_token_tile<kTokens>(p.m, [&](int64_t m, auto tokens) {
        for (int row = 0; row < Int4::kRowsPerBlock; row += V::kLanes) {
          int8_tile<scale.value, offset.value, tokens.value>(p, m, b, row);
        }
      });
    }
  });
}

void fp8_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  fp8_fma_items<V>(p, plan, first, last);
}

void prepare_int8(const float* x, const TokenCut& cut, void* codes, float* scales, void* group_sums) {
  vector_prepare_int8<V>(x, cut, codes, scales, group_sums);
}

void prepare_fp8(const float* x, const TokenCut& cut, void* codes, float* scales, void* group_sums) {
  vector_prepare_fp8<V>(x, cut, codes, scales, group_sums);
}

}  // namespace tilewright::int4_linear::avx2
