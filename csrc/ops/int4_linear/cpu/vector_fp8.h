// SPDX-License-Identifier: Apache-2.0
// FP8 activations with float32 multiply-adds, for levels without a bfloat16 dot product, and the fold mode of all.
#pragma once

#include "ops/int4_linear/cpu/vector_common.h"
#include "ops/int4_linear/cpu/vector_prepare.h"

namespace tilewright::int4_linear {
namespace {

// Slot of the pair order that holds the column which nibble j of a packed 32-bit lane stands for.
inline constexpr int kSlotOfNibble[8] = {0, 4, 2, 6, 1, 5, 3, 7};

inline float bf16_at(const uint16_t* p) { return format::bf16_to_float(*p); }

// kLanes rows of one block, kTokens tokens.
template <class V, ScaleType kScale, OffsetKind kOffset, bool kFold, int kTokens>
void fp8_fma_tile(const Problem& p, int64_t m, int64_t b, int first_row) {
  const Int4View& w = p.weight;
  const auto* x = static_cast<const uint16_t*>(p.x.codes) + m * w.padded_k();
  const auto* sums = static_cast<const float*>(p.x.group_sums) + m * w.groups;
  typename V::F total[kTokens], part[kTokens], dot[kTokens];
  for (int t = 0; t < kTokens; ++t) total[t] = part[t] = V::zero();
  each_run(
      p, m,
      [&](int64_t g) {
        const uint8_t* packed = w.codes(b, g);
        const uint8_t* scales = w.scales(b, g);
        const uint8_t* offsets = w.offsets(b, g);
        const auto scale = V::template load_scales<kScale>(scales, first_row);
        auto zero = V::set1i(kOffset == OffsetKind::kSymmetric ? Int4::kSymmetricZero : 0);
        if constexpr (kOffset == OffsetKind::kZeroPoint) zero = V::load_zero_points(offsets + first_row);
        for (auto& t : dot) t = V::zero();
        const uint16_t* x_group = x + g * w.group;
        for (int64_t s = 0; s < w.group_steps(g); ++s) {
          auto codes = V::loadi(packed + s * Int4::kBytesPerStep + first_row * 4);
          for (int nibble = 0; nibble < Int4::kColsPerStep; ++nibble) {
            auto weight = V::to_float(V::subi(V::andi(codes, V::set1i(Int4::kMaxCode)), zero));
            if constexpr (kFold) weight = round_e4m3<V>(V::mul(weight, scale));
            codes = V::template shift_right<4>(codes);
            for (int t = 0; t < kTokens; ++t) {
              const uint16_t* code = x_group + t * w.padded_k() + s * Int4::kColsPerStep + kSlotOfNibble[nibble];
              dot[t] = V::fma(weight, V::set1(bf16_at(code)), dot[t]);
            }
          }
        }
        for (int t = 0; t < kTokens; ++t) {
          part[t] = kFold ? V::add(part[t], dot[t]) : V::fma(scale, dot[t], part[t]);
          if constexpr (kOffset == OffsetKind::kMinimum) {
            const auto minimum = V::template load_scales<kScale>(offsets, first_row);
            part[t] = V::fma(minimum, V::set1(sums[t * w.groups + g]), part[t]);
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

template <class V>
void fp8_fma_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  constexpr int kTokens = 4;
  const auto run = [&](auto scale, auto offset, auto fold) {
    const int64_t end = std::min(p.weight.blocks, last * plan.blocks_per_item);
    for (int64_t b = first * plan.blocks_per_item; b < end; ++b) {
      each_token_tile<kTokens>(p.m, [&](int64_t m, auto tokens) {
        for (int row = 0; row < Int4::kRowsPerBlock; row += V::kLanes) {
          fp8_fma_tile<V, scale.value, offset.value, fold.value, tokens.value>(p, m, b, row);
        }
      });
    }
  };
  with_format(p.weight, [&](auto scale, auto offset) {
    // Fold is defined for symmetric weights alone; the adapter has checked.
    if constexpr (offset.value == OffsetKind::kSymmetric) {
      if (p.mode == Mode::kFold) return run(scale, offset, std::true_type{});
    }
    run(scale, offset, std::false_type{});
  });
}

}  // namespace
}  // namespace tilewright::int4_linear
