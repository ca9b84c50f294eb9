// SPDX-License-Identifier: Apache-2.0
// Few tokens: ops/common/weight_stream.cuh over packing mma2. Weights are the 16-row operand of mma.m16n8k32 even for one
// token: 7 instructions decode 16 weights a thread and one multiplies them, where dot products of four bytes would take four.
#pragma once

#include "ops/common/weight_stream.cuh"
#include "ops/ternary_linear/cuda/common.cuh"

namespace tilewright::ternary_linear::cuda {

struct SmallParams {
  weight_stream::Cut cut;
  Problem problem;
  bool weights_first;
};

struct SmallFormat {
  using Params = SmallParams;
  using Sum = int32_t;
  static constexpr int kAhead = kStreamAhead;
  static constexpr int kSteps = TernaryMma2::kColsPerChunk / TernaryMma2::kColsPerStep;
  static constexpr int kFragmentBytes = 32 * 16;  // of 8 tokens by two steps
  static constexpr int kTileBytes = kSteps / 2 * kFragmentBytes;
  static constexpr int kUnitBytes = TernaryMma2::kBytesPerPanel;

  using Unit = hopper::U128;  // a word of each step

  struct Source {
    const uint8_t* words;  // this lane's

    TILEWRIGHT_DEVICE void seek(const SmallParams& p, int panel, int tile) {
      words = p.problem.payload + panel / TernaryMma2::kPanels * TernaryMma2::block_bytes(p.problem.k) +
              panel % TernaryMma2::kPanels * TernaryMma2::kBytesPerPanel +
              int64_t{tile} * TernaryMma2::kBytesPerChunk + threadIdx.x % 32 * 16;
    }
    TILEWRIGHT_DEVICE void copy(const SmallParams& /*p*/, char* to) {
      hopper::copy_async_16(to + threadIdx.x % 32 * 16, words);
      words += TernaryMma2::kBytesPerChunk;
    }
  };

  static TILEWRIGHT_DEVICE Unit load(const char* from) { return hopper::load_16(from + threadIdx.x % 32 * 16); }

  static TILEWRIGHT_DEVICE int row_of(int lane, int i) { return lane / 4 * 2 + i / 2; }

  // Four bytes of a row; past its end come zeros.
  static TILEWRIGHT_DEVICE uint32_t columns_of(const Problem& p, const int8_t* row, int64_t column) {
    return column < p.x_stride ? *reinterpret_cast<const uint32_t*>(row + column) : 0u;
  }

  template <int kGroups>
  static TILEWRIGHT_DEVICE void stage(const SmallParams& params, const weight_stream::Part& part, char* tokens) {
    const Problem& p = params.problem;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 8
    for (int i = warp; i < part.tiles * (kSteps / 2) * kGroups; i += weight_stream::kWarps) {
      const int token = i % kGroups * 8 + lane / 4;
      hopper::U128 fragment{0, 0, 0, 0};
      if (token < p.m) {
        const int8_t* row = p.x + token * p.x_stride;
        const int64_t column = int64_t{part.first_tile} * TernaryMma2::kColsPerChunk + i / kGroups * 64 + lane % 4 * 4;
        fragment = {columns_of(p, row, column), columns_of(p, row, column + 16), columns_of(p, row, column + 32),
                    columns_of(p, row, column + 48)};
      }
      hopper::store_16(tokens + i * kFragmentBytes + lane * 16, fragment);
    }
  }

  template <int kGroups>
  static TILEWRIGHT_DEVICE void multiply(const SmallParams& /*p*/, const Unit& unit, const char* tokens,
                                         int32_t (&sums)[kGroups][4]) {
    const uint32_t words[kSteps] = {unit.x, unit.y, unit.z, unit.w};
    const char* fragments = tokens + threadIdx.x % 32 * 16;
    int32_t part[2][kGroups][4] = {};  // shorter chains
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4];
      decode(words[2 * half], a[0]);
      decode(words[2 * half + 1], a[1]);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const hopper::U128 b = hopper::load_16(fragments + (half * kGroups + g) * kFragmentBytes);
        hopper::mma_m16n8k32_s8s8(part[0][g], a[0], {b.x, b.y});
        hopper::mma_m16n8k32_s8s8(part[1][g], a[1], {b.z, b.w});
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[g][i] += unscaled(part[0][g][i] + part[1][g][i]);
    }
  }

  using Output = float;  // the token's scale
  static TILEWRIGHT_DEVICE Output output_of(const SmallParams& params, int token) {
    const Problem& p = params.problem;
    return p.out.token_scales != nullptr && token < p.m ? p.out.token_scales[token] : 0.0f;
  }

  static TILEWRIGHT_DEVICE void write(const SmallParams& params, Output token_scale, int64_t row, int token,
                                      int32_t sum) {
    const Problem& p = params.problem;
    if (row >= p.n || token >= p.m) return;
    const int64_t place = token * p.n + row;
    if (p.out.element == Element::kInt32) {
      static_cast<int32_t*>(p.out.y)[place] = sum;
      return;
    }
    const float scale = token_scale * p.out.weight_scales[row * p.out.weight_scale_step];
    const auto wide = static_cast<float>(sum);
    const float value = p.out.bias == nullptr ? wide * scale : fmaf(wide, scale, p.out.bias[row]);
    switch (p.out.element) {
      case Element::kFloat: static_cast<float*>(p.out.y)[place] = value; break;
      case Element::kBFloat16:
        static_cast<hopper::bf16*>(p.out.y)[place] = hopper::from_float<hopper::bf16>(value);
        break;
      default: static_cast<hopper::f16*>(p.out.y)[place] = hopper::from_float<hopper::f16>(value);
    }
  }
};

}  // namespace tilewright::ternary_linear::cuda
