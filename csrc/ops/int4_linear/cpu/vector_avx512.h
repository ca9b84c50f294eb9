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

constexpr int kStrip = 2;              // blocks side by side: each broadcast activation serves both
constexpr int kTokensPerTile = 5;      // 10 accumulators and 10 totals leave room for operands; 6 spill, 4 reuse less
constexpr int kPrefetchBytes = 512;    // a row block crosses pages, where the hardware prefetcher stops

inline __m512i broadcast(const void* codes, int64_t word) {
  int32_t value;
  std::memcpy(&value, static_cast<const uint8_t*>(codes) + word * 4, sizeof(value));
  return _mm512_set1_epi32(value);
}

// Group scales and offsets of a strip.
template <ScaleType kScale>
struct Groups {
  const Int4View& w;
  const uint8_t* block[kStrip];

  __m512 scale(int64_t g, int b) const {
    return Vec16::load_scales<kScale>(block[b] + w.scales_at, g * Int4::kRowsPerBlock);
  }
  __m512 minimum(int64_t g, int b) const {
    return Vec16::load_scales<kScale>(block[b] + w.offsets_at, g * Int4::kRowsPerBlock);
  }
  __m512i zero(int64_t g, int b) const {
    return Vec16::load_zero_points(block[b] + w.offsets_at + g * Int4::kRowsPerBlock);
  }
};

// kTokens tokens x kBlocks blocks.
template <class Dot, ScaleType kScale, OffsetKind kOffset, int kTokens, int kBlocks>
void tile(const Problem& p, const Dot& dot, const Groups<kScale>& groups, int64_t m, int64_t first_block) {
  const Int4View& w = p.weight;
  const int64_t row_bytes = w.padded_k() * Dot::kCodeBytes;
  const auto* x = static_cast<const uint8_t*>(p.x.codes) + m * row_bytes;
  const auto* sums = static_cast<const typename Dot::Sum*>(p.x.group_sums) + m * w.groups;
  __m512 total[kTokens][kBlocks], part[kTokens][kBlocks];
  for (int t = 0; t < kTokens; ++t) {
    for (int b = 0; b < kBlocks; ++b) total[t][b] = part[t][b] = _mm512_setzero_ps();
  }
  each_run(p, m, [&](int64_t g) {
    typename Dot::Acc acc[kTokens][kBlocks];
    for (int t = 0; t < kTokens; ++t) {
      for (int b = 0; b < kBlocks; ++b) {
        if constexpr (kOffset == OffsetKind::kZeroPoint) {
          acc[t][b] = Dot::start(sums[t * w.groups + g], groups.zero(g, b));
        } else {
          acc[t][b] = Dot::template start<kOffset>(sums[t * w.groups + g]);
        }
      }
    }
    const int64_t end = g * w.steps_per_group + group_steps(w, g);
    for (int64_t s = g * w.steps_per_group; s < end; ++s) {
      __m512i vectors[kBlocks][Dot::kVectors];
      for (int b = 0; b < kBlocks; ++b) {
        const uint8_t* at = groups.block[b] + s * Int4::kBytesPerStep;
        _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
        dot.decode(_mm512_loadu_si512(at), vectors[b]);
      }
#pragma GCC unroll 4
      for (int v = 0; v < Dot::kVectors; ++v) {
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const __m512i word = broadcast(x + t * row_bytes, s * Dot::kVectors + v);
#pragma GCC unroll 2
          for (int b = 0; b < kBlocks; ++b) acc[t][b] = Dot::dot(acc[t][b], vectors[b][v], word);
        }
      }
    }
    for (int b = 0; b < kBlocks; ++b) {
      const __m512 scale = groups.scale(g, b);
      for (int t = 0; t < kTokens; ++t) part[t][b] = _mm512_fmadd_ps(scale, Dot::to_float(acc[t][b]), part[t][b]);
      if constexpr (kOffset == OffsetKind::kMinimum) {
        const __m512 minimum = groups.minimum(g, b);
        for (int t = 0; t < kTokens; ++t) {
          const __m512 sum = Dot::broadcast_sum(sums[t * w.groups + g]);
          part[t][b] = _mm512_fmadd_ps(minimum, sum, part[t][b]);
        }
      }
    }
  }, [&](const auto& scale) {
    for (int t = 0; t < kTokens; ++t) {
      const __m512 s = _mm512_set1_ps(scale(t));
      for (int b = 0; b < kBlocks; ++b) {
        total[t][b] = _mm512_fmadd_ps(s, part[t][b], total[t][b]);
        part[t][b] = _mm512_setzero_ps();
      }
    }
  });
  for (int t = 0; t < kTokens; ++t) {
    for (int b = 0; b < kBlocks; ++b) finish<Vec16>(p, m + t, (first_block + b) * Int4::kRowsPerBlock, total[t][b]);
  }
}

template <class Dot>
void items_avx512(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  const Int4View& w = p.weight;
  const Dot dot(w.offset_kind == OffsetKind::kSymmetric);
  with_format(w, [&](auto scale, auto offset) {
    const auto strip = [&](int64_t b, auto blocks) {
      const Groups<scale.value> groups{w, {w.block(b), w.block(b + blocks.value - 1)}};
      each_token_tile<kTokensPerTile>(p.m, [&](int64_t m, auto tokens) {
        tile<Dot, scale.value, offset.value, tokens.value, blocks.value>(p, dot, groups, m, b);
      });
    };
    const int64_t end = std::min(w.blocks, last * plan.blocks_per_item);
    int64_t b = first * plan.blocks_per_item;
    for (; b + kStrip <= end; b += kStrip) strip(b, Constant<kStrip>{});
    if (b < end) strip(b, Constant<1>{});
  });
}

}  // namespace
}  // namespace tilewright::int4_linear
