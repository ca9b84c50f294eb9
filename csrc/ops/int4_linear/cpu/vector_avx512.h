// SPDX-License-Identifier: Apache-2.0
// The tile of the AVX-512 levels, over a Dot that knows the activation format.
//
// Codes are decoded where they are used, also for many tokens: and, shift and table lookup run beside the dot products,
// and a panel decoded once and kept in cache was slower at every size measured. A group's products are added in one
// fixed order, so a token's result does not depend on how many tokens come with it.
//
// A Dot provides: kVectors (vectors a step decodes to), kCodeBytes (of one activation), Acc, Sum,
//   start(sum[, zero])      accumulator of a group before its products
//   decode(packed, vectors) 64 packed bytes -> kVectors operands
//   dot(acc, vector, word)  acc + products with one broadcast word of activations
//   to_float(acc), broadcast_sum(sum)
#pragma once

#include "isa/vec_avx512.h"
#include "ops/int4_linear/cpu/vector_common.h"

namespace tilewright::int4_linear {
namespace {

constexpr int kTokensPerTile = 5;  // 10 accumulators and 10 totals leave room for operands; 6 spill, 4 reuse less

inline __m512i broadcast(const void* codes, int64_t word) {
  int32_t value;
  std::memcpy(&value, static_cast<const uint8_t*>(codes) + word * 4, sizeof(value));
  return _mm512_set1_epi32(value);
}

// kTokens tokens x one block, or its first half where the rows end there. Both halves share each broadcast activation.
template <class Dot, ScaleType kScale, OffsetKind kOffset, int kTokens, int kHalves>
void tile(const Problem& p, const Dot& dot, int64_t m, int64_t block) {
  const Int4View& w = p.weight;
  const int64_t row_bytes = w.padded_k() * Dot::kCodeBytes;
  const auto* x = static_cast<const uint8_t*>(p.x.codes) + m * row_bytes;
  const auto* sums = static_cast<const typename Dot::Sum*>(p.x.group_sums) + m * w.groups;
  __m512 total[kTokens][kHalves], part[kTokens][kHalves];
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < kHalves; ++h) total[t][h] = part[t][h] = _mm512_setzero_ps();
  }
  each_run(
      p, m,
      [&](int64_t g) {
        const uint8_t* codes = w.codes(block, g);
        const uint8_t* scales = w.scales(block, g);
        const uint8_t* offsets = w.offsets(block, g);
        typename Dot::Acc acc[kTokens][kHalves];
        for (int t = 0; t < kTokens; ++t) {
          for (int h = 0; h < kHalves; ++h) {
            if constexpr (kOffset == OffsetKind::kZeroPoint) {
              acc[t][h] = Dot::start(sums[t * w.groups + g], Vec16::load_zero_points(offsets + h * 16));
            } else {
              acc[t][h] = Dot::template start<kOffset>(sums[t * w.groups + g]);
            }
          }
        }
        const int64_t first_word = g * w.steps_per_group * Dot::kVectors;
        for (int64_t s = 0; s < w.group_steps(g); ++s) {
          __m512i vectors[kHalves][Dot::kVectors];
          for (int h = 0; h < kHalves; ++h) {
            const uint8_t* at = codes + s * Int4::kBytesPerStep + h * Int4::kBytesPerVector;
            prefetch(at + kPrefetchBytes);
            dot.decode(_mm512_loadu_si512(at), vectors[h]);
          }
#pragma GCC unroll 4
          for (int v = 0; v < Dot::kVectors; ++v) {
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) {
              const __m512i word = broadcast(x + t * row_bytes, first_word + s * Dot::kVectors + v);
#pragma GCC unroll 2
              for (int h = 0; h < kHalves; ++h) acc[t][h] = Dot::dot(acc[t][h], vectors[h][v], word);
            }
          }
        }
        for (int h = 0; h < kHalves; ++h) {
          const __m512 scale = Vec16::load_scales<kScale>(scales, h * 16);
          for (int t = 0; t < kTokens; ++t) part[t][h] = _mm512_fmadd_ps(scale, Dot::to_float(acc[t][h]), part[t][h]);
          if constexpr (kOffset == OffsetKind::kMinimum) {
            const __m512 minimum = Vec16::load_scales<kScale>(offsets, h * 16);
            for (int t = 0; t < kTokens; ++t) {
              const __m512 sum = Dot::broadcast_sum(sums[t * w.groups + g]);
              part[t][h] = _mm512_fmadd_ps(minimum, sum, part[t][h]);
            }
          }
        }
      },
      [&](const auto& scale) {
        for (int t = 0; t < kTokens; ++t) {
          const __m512 s = _mm512_set1_ps(scale(t));
          for (int h = 0; h < kHalves; ++h) {
            total[t][h] = _mm512_fmadd_ps(s, part[t][h], total[t][h]);
            part[t][h] = _mm512_setzero_ps();
          }
        }
      });
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < kHalves; ++h)
      finish<Vec16>(p, m + t, block * Int4::kRowsPerBlock + h * Int4::kRowsPerVector, total[t][h]);
  }
}

template <class Dot>
void items_avx512(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  const Int4View& w = p.weight;
  const Dot dot(w.offset_kind == OffsetKind::kSymmetric);
  with_format(w, [&](auto scale, auto offset) {
    const auto run = [&](int64_t b, auto halves) {
      each_token_tile<kTokensPerTile>(p.m, [&](int64_t m, auto tokens) {
        tile<Dot, scale.value, offset.value, tokens.value, halves.value>(p, dot, m, b);
      });
    };
    const int64_t end = std::min(w.blocks, last * plan.blocks_per_item);
    for (int64_t b = first * plan.blocks_per_item; b < end; ++b) {
      const bool half = w.n - b * Int4::kRowsPerBlock <= Int4::kRowsPerVector;
      half ? run(b, Constant<1>{}) : run(b, Constant<2>{});
    }
  });
}

}  // namespace
}  // namespace tilewright::int4_linear
