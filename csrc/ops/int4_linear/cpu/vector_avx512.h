// SPDX-License-Identifier: Apache-2.0
// The two walks of the AVX-512 levels, over a Dot that knows the activation format.
//
// Stream: codes are decoded where they are used. Panel: a strip of 32 rows is decoded once and reused over all tokens.
// Both add a group's products in the same order, so a token's result does not depend on how many tokens come with it.
//
// A Dot provides: kVectors (vectors a step decodes to), Word (what one broadcast of activations covers), Acc, Sum,
//   start(sum, zero)        accumulator of a group before its products
//   decode(step, vectors)   64 packed bytes -> kVectors operands
//   dot(acc, vector, word)  acc + products
//   to_float(acc)
#pragma once

#include "isa/vec_avx512.h"
#include "ops/int4_linear/cpu/vector_common.h"

namespace tilewright::int4_linear {
namespace {

constexpr int kStrip = 2;   // blocks side by side: each broadcast activation serves both

template <class Dot>
__m512i broadcast(const void* codes, int64_t word) {
  int32_t value;
  std::memcpy(&value, static_cast<const uint8_t*>(codes) + word * 4, sizeof(value));
  return _mm512_set1_epi32(value);
}

// Group scales and offsets of a strip as the tiles want them: read from the packed block, or expanded beforehand.
template <ScaleType kScale, OffsetKind kOffset>
struct PackedGroups {
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

template <OffsetKind kOffset>
struct ExpandedGroups {
  const float* scales;    // [G][32]
  const float* offsets;   // [G][32], minima or (as integers) zero points

  __m512 scale(int64_t g, int b) const { return _mm512_load_ps(scales + (g * kStrip + b) * 16); }
  __m512 minimum(int64_t g, int b) const { return _mm512_load_ps(offsets + (g * kStrip + b) * 16); }
  __m512i zero(int64_t g, int b) const { return _mm512_castps_si512(minimum(g, b)); }
};

// One tile: kTokens tokens x kBlocks blocks. operands(b, step, vectors) yields the decoded weights of a step.
template <class Dot, OffsetKind kOffset, int kTokens, int kBlocks, class Groups, class Operands>
inline __attribute__((always_inline)) void tile(const Problem& p, int64_t m, int64_t first_block, const Groups& groups,
                                                const Operands& operands) {
  const Int4View& w = p.weight;
  const int64_t row_bytes = w.padded_k() * Dot::kCodeBytes;
  const auto* x = static_cast<const uint8_t*>(p.x.codes) + m * row_bytes;
  const auto* sums = static_cast<const typename Dot::Sum*>(p.x.group_sums) + m * w.groups;
  __m512 total[kTokens][kBlocks];
  for (auto& row : total)
    for (auto& t : row) t = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
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
      for (int b = 0; b < kBlocks; ++b) operands(b, s, vectors[b]);
#pragma GCC unroll 4
      for (int v = 0; v < Dot::kVectors; ++v) {
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const __m512i word = broadcast<Dot>(x + t * row_bytes, s * Dot::kVectors + v);
#pragma GCC unroll 2
          for (int b = 0; b < kBlocks; ++b) acc[t][b] = Dot::dot(acc[t][b], vectors[b][v], word);
        }
      }
    }
    for (int b = 0; b < kBlocks; ++b) {
      const __m512 scale = groups.scale(g, b);
      for (int t = 0; t < kTokens; ++t) total[t][b] = _mm512_fmadd_ps(scale, Dot::to_float(acc[t][b]), total[t][b]);
      if constexpr (kOffset == OffsetKind::kMinimum) {
        const __m512 minimum = groups.minimum(g, b);
        for (int t = 0; t < kTokens; ++t) {
          const __m512 sum = _mm512_set1_ps(static_cast<float>(sums[t * w.groups + g]));
          total[t][b] = _mm512_fmadd_ps(minimum, sum, total[t][b]);
        }
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int b = 0; b < kBlocks; ++b) finish<Vec16>(p, m + t, (first_block + b) * Int4::kRowsPerBlock, total[t][b]);
  }
}

template <class Dot, ScaleType kScale, OffsetKind kOffset>
void stream_strip(const Problem& p, int64_t first_block, int64_t blocks) {
  constexpr int kTokens = 4;
  constexpr int kPrefetchBytes = 1024;
  const Int4View& w = p.weight;
  const Dot dot(kOffset == OffsetKind::kSymmetric);
  const auto run = [&](auto count) {
    const PackedGroups<kScale, kOffset> groups{w, {w.block(first_block), w.block(first_block + count.value - 1)}};
    const auto operands = [&](int b, int64_t s, __m512i* vectors) {
      const uint8_t* at = groups.block[b] + s * Int4::kBytesPerStep;
      _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
      dot.decode(_mm512_loadu_si512(at), vectors);
    };
    each_token_tile<kTokens>(p.m, [&](int64_t m, auto tokens) {
      tile<Dot, kOffset, tokens.value, count.value>(p, m, first_block, groups, operands);
    });
  };
  if (blocks == kStrip) return run(Constant<kStrip>{});
  run(Constant<1>{});
}

// The decoded strip: operands [step][vector][block] of 64 bytes, then scales and offsets [G][32] as float.
template <class Dot, ScaleType kScale, OffsetKind kOffset>
void panel_strip(const Problem& p, int64_t first_block, int64_t blocks) {
  constexpr int kTokens = 6;   // 12 accumulators and 12 totals, 8 registers for operands
  const Int4View& w = p.weight;
  const int64_t operand_bytes = w.steps * Dot::kVectors * kStrip * 64;
  const int64_t lanes = w.groups * kStrip * 16;
  thread_local Scratch scratch;
  auto* panel = scratch.get<uint8_t>(operand_bytes + 2 * lanes * 4);
  auto* scales = reinterpret_cast<float*>(panel + operand_bytes);
  float* offsets = scales + lanes;

  const Dot dot(kOffset == OffsetKind::kSymmetric);
  const PackedGroups<kScale, kOffset> packed{w, {w.block(first_block), w.block(first_block + blocks - 1)}};
  for (int b = 0; b < kStrip; ++b) {
    for (int64_t s = 0; s < w.steps; ++s) {
      __m512i vectors[Dot::kVectors];
      dot.decode(_mm512_loadu_si512(packed.block[b] + s * Int4::kBytesPerStep), vectors);
      for (int v = 0; v < Dot::kVectors; ++v) {
        _mm512_store_si512(panel + ((s * Dot::kVectors + v) * kStrip + b) * 64, vectors[v]);
      }
    }
    for (int64_t g = 0; g < w.groups; ++g) {
      _mm512_store_ps(scales + (g * kStrip + b) * 16, packed.scale(g, b));
      float* offset = offsets + (g * kStrip + b) * 16;
      if constexpr (kOffset == OffsetKind::kMinimum) _mm512_store_ps(offset, packed.minimum(g, b));
      if constexpr (kOffset == OffsetKind::kZeroPoint) _mm512_store_si512(offset, packed.zero(g, b));
    }
  }

  const ExpandedGroups<kOffset> groups{scales, offsets};
  const auto operands = [panel](int b, int64_t s, __m512i* vectors) {
    for (int v = 0; v < Dot::kVectors; ++v) {
      vectors[v] = _mm512_load_si512(panel + ((s * Dot::kVectors + v) * kStrip + b) * 64);
    }
  };
  each_token_tile<kTokens>(p.m, [&](int64_t m, auto tokens) {
    tile<Dot, kOffset, tokens.value, kStrip>(p, m, first_block, groups, operands);
  });
}

template <class Dot>
void items_avx512(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  with_format(p.weight, [&](auto scale, auto offset) {
    const int64_t end = std::min(p.weight.blocks, last * plan.blocks_per_item);
    for (int64_t b = first * plan.blocks_per_item; b < end; b += kStrip) {
      const int64_t blocks = std::min<int64_t>(kStrip, end - b);
      if (plan.walk == Walk::kPanel) {
        panel_strip<Dot, scale.value, offset.value>(p, b, blocks);
      } else {
        stream_strip<Dot, scale.value, offset.value>(p, b, blocks);
      }
    }
  });
}

}  // namespace
}  // namespace tilewright::int4_linear
