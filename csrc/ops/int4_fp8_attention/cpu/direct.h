// SPDX-License-Identifier: Apache-2.0
// The two products for few rows of queries and an INT4 cache (decoding): codes are decoded into registers and
// multiplied there. A panel would be written and read once for little reuse.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "ops/int4_fp8_attention/cpu/shape.h"

namespace tilewright::int4_fp8_attention {

template <class Isa>
struct Direct {
  using F = typename Isa::F;
  using U = typename Isa::U;
  using Unit = typename Isa::Unit;
  static constexpr int64_t kLanes = Isa::kLanes;

  struct Operands {
    const Shape& shape;
    const Rows& rows;  // K or V of the tile
    int64_t vectors;  // of the tile's keys
    const Unit* left;  // queries [rows][terms][key_depth], or weights [scale_groups][strip][tile depth]
    int64_t left_stride;
    const float* scales;  // scores: [scale_groups][kKeysPerTile]; values: correction [rows]
    float* out;  // scores or sums
    int64_t out_stride;
    int64_t group_stride;  // values: units between the weights of scale groups
  };

  static void scores(int64_t rows, const Operands& o) {
    static constexpr auto kTable = score_table(Counts{});
    kTable[static_cast<size_t>(rows - 1)](o);
  }
  static void values(int64_t rows, const Operands& o) {
    static constexpr auto kTable = value_table(Counts{});
    kTable[static_cast<size_t>(rows - 1)](o);
  }

 private:
  using Kernel = void (*)(const Operands&);
  using Counts = std::make_integer_sequence<int, static_cast<int>(Isa::kDirectRows)>;
  static constexpr int64_t kWordsPerGroup = format::Int4Kv::kGroup / 8;

  template <int kRows>
  static void scores_rows(const Operands& o) {
    if (o.shape.query_terms == 2) {
      scores_steps<kRows, 1, 2>(o);
    } else {
      scores_steps<kRows, kRows == 1 ? 4 : 2, 1>(o);
    }
  }

  template <int kRows, int kSteps, int kTerms>
  static void scores_steps(const Operands& o) {
    for (int64_t v = 0; v < o.vectors;) {
      const bool together = v + kSteps <= o.vectors;
      for (int64_t word = 0, g = 0; word < o.shape.words; word += kWordsPerGroup, ++g) {
        if (together) {
          score_group<kRows, kSteps, kTerms>(o, v, word, g);
        } else {
          score_group<kRows, 1, kTerms>(o, v, word, g);
        }
      }
      v += together ? kSteps : 1;
    }
  }

  // One sum for each row, vector of keys and term, in the order of the panel's product, so that both ways give the same
  // bits. Several vectors or terms at once, so that the latency of one hides behind the others.
  template <int kRows, int kSteps, int kTerms>
  static void score_group(const Operands& o, int64_t v, int64_t first_word, int64_t g) {
    const int64_t left_stride = o.left_stride, term_stride = o.shape.key_depth;
    F sum[kTerms][kRows][kSteps];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < kSteps * kTerms; ++s) sum[s / kSteps][r][s % kSteps] = Isa::zero();
    }
    const int64_t last_word = std::min(o.shape.words, first_word + kWordsPerGroup);
    for (int64_t word = first_word; word < last_word; word += kWordsPerStep) {
      const auto multiply = [&](int64_t unit, int64_t j, const U(&x)[kSteps]) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
          for (int t = 0; t < kTerms; ++t) {
            const U q = Isa::broadcast_unit(o.left + r * left_stride + t * term_stride + unit + j);
#pragma GCC unroll 8
            for (int s = 0; s < kSteps; ++s) sum[t][r][s] = Isa::dot(sum[t][r][s], q, x[s]);
          }
        }
      };
      Isa::template keys<kSteps>(o.shape, o.rows, v * kLanes, word, multiply);
    }
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) {
      const F scale = Isa::load(o.scales + g * kKeysPerTile + (v + s) * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        float* out = o.out + r * o.out_stride + (v + s) * kLanes;
        F score = g == 0 ? Isa::mul(sum[0][r][s], scale) : Isa::fma(sum[0][r][s], scale, Isa::load(out));
        if constexpr (kTerms == 2) score = Isa::fma(sum[1][r][s], scale, score);
        Isa::store(out, score);
      }
    }
  }

  template <int kRows>
  static void values_rows(const Operands& o) {
    const int64_t tokens = o.vectors * kLanes;
    for (int64_t n = 0; n < o.shape.value_vectors; n += kCodesPerLane) {
      F sum[kRows][kCodesPerLane];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F correction = Isa::set1(o.scales[r]);
#pragma GCC unroll 8
        for (int64_t j = 0; j < kCodesPerLane; ++j) {
          sum[r][j] = Isa::mul(Isa::load(o.out + r * o.out_stride + (n + j) * kLanes), correction);
        }
      }
      const Unit* left = o.left + n / o.shape.group_vectors * o.group_stride;
      for (int64_t t = 0; t < tokens; t += Isa::kDepthPerUnit, ++left) {
        U weight[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) weight[r] = Isa::broadcast_unit(left + r * o.left_stride);
        Isa::value_codes(o.rows, t, n / kCodesPerLane * Isa::kPieceBytes, [&](int64_t j, U x) {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) sum[r][j] = Isa::dot(sum[r][j], weight[r], x);
        });
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int64_t j = 0; j < kCodesPerLane; ++j) Isa::store(o.out + r * o.out_stride + (n + j) * kLanes, sum[r][j]);
      }
    }
  }

  template <int... kCount>
  static constexpr auto score_table(std::integer_sequence<int, kCount...>) {
    return std::array<Kernel, sizeof...(kCount)>{&scores_rows<kCount + 1>...};
  }
  template <int... kCount>
  static constexpr auto value_table(std::integer_sequence<int, kCount...>) {
    return std::array<Kernel, sizeof...(kCount)>{&values_rows<kCount + 1>...};
  }
};

}  // namespace tilewright::int4_fp8_attention
