// SPDX-License-Identifier: Apache-2.0
// The two matrix products of attention on panels: scores = (q k^T) times a scale per key, and sums = sums times a
// correction per row + weights v. Blocks of kRows x kCols vectors stay in registers: every loop over one is unrolled,
// or the compiler would keep the block in memory.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

namespace tilewright::int4_fp8_attention {

template <class Isa>
struct Multiply {
  using F = typename Isa::F;
  using Unit = typename Isa::Unit;

  struct Operands {
    const Unit* left;  // [rows][depth], one unit is broadcast at a time
    int64_t left_stride;
    const Unit* right;  // [depth][cols vectors]
    int64_t right_stride;
    int64_t depth;
    const float* scales;  // per column for scores, per row for values
    bool add;  // scores: add to out; values always do
    float* out;
    int64_t out_stride;
  };

  // rows 1..kRows, cols 1..kCols.
  static void scores(int64_t rows, int64_t cols, const Operands& o) {
    static constexpr auto kTable = score_table(Blocks{});
    kTable[static_cast<size_t>((rows - 1) * Isa::kCols + cols - 1)](o);
  }
  static void values(int64_t rows, int64_t cols, const Operands& o) {
    static constexpr auto kTable = value_table(Blocks{});
    kTable[static_cast<size_t>((rows - 1) * Isa::kCols + cols - 1)](o);
  }

 private:
  using Kernel = void (*)(const Operands&);
  using Blocks = std::make_integer_sequence<int, Isa::kRows * Isa::kCols>;

  template <int kRows, int kCols>
  static void product(const Operands& o, F (&sum)[kRows][kCols]) {
    const Unit* left = o.left;
    const Unit* right = o.right;
    const int64_t depth = o.depth, left_stride = o.left_stride, right_stride = o.right_stride;
    for (int64_t k = 0; k < depth; ++k, ++left, right += right_stride) {
      typename Isa::U b[kCols];
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) b[c] = Isa::load_units(right + c * Isa::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename Isa::U a = Isa::broadcast_unit(left + r * left_stride);
#pragma GCC unroll 8
        for (int c = 0; c < kCols; ++c) sum[r][c] = Isa::dot(sum[r][c], a, b[c]);
      }
    }
  }

  template <int kRows, int kCols>
  static void scores_block(const Operands& o) {
    F sum[kRows][kCols];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) sum[r][c] = Isa::zero();
    }
    product<kRows, kCols>(o, sum);
    F scale[kCols];
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) scale[c] = Isa::load(o.scales + c * Isa::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) {
        float* out = o.out + r * o.out_stride + c * Isa::kLanes;
        Isa::store(out, o.add ? Isa::fma(sum[r][c], scale[c], Isa::load(out)) : Isa::mul(sum[r][c], scale[c]));
      }
    }
  }

  template <int kRows, int kCols>
  static void values_block(const Operands& o) {
    F sum[kRows][kCols];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F correction = Isa::set1(o.scales[r]);
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) {
        sum[r][c] = Isa::mul(Isa::load(o.out + r * o.out_stride + c * Isa::kLanes), correction);
      }
    }
    product<kRows, kCols>(o, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) Isa::store(o.out + r * o.out_stride + c * Isa::kLanes, sum[r][c]);
    }
  }

  template <int... kBlock>
  static constexpr auto score_table(std::integer_sequence<int, kBlock...>) {
    return std::array<Kernel, sizeof...(kBlock)>{&scores_block<kBlock / Isa::kCols + 1, kBlock % Isa::kCols + 1>...};
  }
  template <int... kBlock>
  static constexpr auto value_table(std::integer_sequence<int, kBlock...>) {
    return std::array<Kernel, sizeof...(kBlock)>{&values_block<kBlock / Isa::kCols + 1, kBlock % Isa::kCols + 1>...};
  }
};

}  // namespace tilewright::int4_fp8_attention
