// SPDX-License-Identifier: Apache-2.0
// Few tokens by signed codes with one scale of 16 bits a row and chunk: ops/common/weight_stream.cuh over the Hopper layout.
//
// Hopper has no FP8 product for a warp, so codes and tokens become 16-bit floats, both exactly: a half whose bits 8 to 10 are
// a magnitude, the others but the sign zero, is that number times 2^-16.
#pragma once

#include "ops/common/weight_stream.cuh"
#include "ops/int4_linear/cuda/launch.h"
#include "ops/int4_linear/cuda/numbers.cuh"

namespace tilewright::int4_linear {

struct StreamParams {
  weight_stream::Cut cut;
  const uint8_t* chunks;
  const float* per_tensor_scale;
  const uint8_t* codes;  // [M, padded_k]
  const float* x_scales;
  const void* bias;
  const void* residual;  // null, or [M, N] of y_type, added
  void* y;
  int64_t m, n, padded_k;
  int chunk_bytes;
  format::ScaleType scale_type;
  Number bias_type, y_type;
  bool weights_first;
};

struct StreamFormat {
  using Chunk = format::Int4Hopper;
  using Params = StreamParams;
  using Sum = float;
  static constexpr int kAhead = kStreamAhead;
  static constexpr int kSteps = Chunk::kCols / 32;  // of a unit
  static constexpr int kFragmentBytes = 32 * 16;  // of 8 tokens by 32 columns
  static constexpr int kTileBytes = kSteps * kFragmentBytes;
  static constexpr int kUnitBytes = kStreamUnitBytes;

  struct Unit {
    hopper::U128 codes[2];
    uint32_t scales;  // of the rows r and r + 8
  };

  struct Source {
    const uint8_t* codes;  // this lane's
    const uint8_t* scales;

    TILEWRIGHT_DEVICE void seek(const StreamParams& p, int panel, int tile) {
      constexpr int kPanelsOfChunk = Chunk::kRows / weight_stream::kPanelRows;
      const int lane = static_cast<int>(threadIdx.x) % 32, place = panel % kPanelsOfChunk;
      const uint8_t* chunk =
          p.chunks + (static_cast<int64_t>(panel / kPanelsOfChunk) * p.cut.tiles + tile) * p.chunk_bytes;
      codes = chunk + Chunk::word_offset(weight_stream::kPanelRows * place, 0, 0) + lane * 16;
      scales = chunk + Chunk::kCodeBytes + Chunk::row_order(weight_stream::kPanelRows * place + lane / 4) * 2;
    }
    TILEWRIGHT_DEVICE void copy(const StreamParams& p, char* to) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      hopper::copy_async_16(to + lane * 16, codes);
      hopper::copy_async_16(to + 512 + lane * 16, codes + Chunk::kThreads * 16);
      hopper::copy_async_4(to + 1024 + lane * 4, scales);
      codes += p.chunk_bytes;
      scales += p.chunk_bytes;
    }
  };

  static TILEWRIGHT_DEVICE Unit load(const char* from) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return {{hopper::load_16(from + lane * 16), hopper::load_16(from + 512 + lane * 16)},
            *reinterpret_cast<const uint32_t*>(from + 1024 + lane * 4)};
  }

  static TILEWRIGHT_DEVICE int row_of(int lane, int i) { return lane / 4 + i / 2 * 8; }

  // Four codes of a token to the halves (0, 2) and (1, 3), as the words of weights are taken apart.
  static TILEWRIGHT_DEVICE void widen(uint32_t codes, uint32_t& even, uint32_t& odd) {
    even = hopper::e4m3x2_to_f16x2(static_cast<uint16_t>(__byte_perm(codes, 0u, 0x4420u)));
    odd = hopper::e4m3x2_to_f16x2(static_cast<uint16_t>(__byte_perm(codes, 0u, 0x4431u)));
  }

  template <int kGroups>
  static TILEWRIGHT_DEVICE void stage(const StreamParams& p, const weight_stream::Part& part, char* tokens) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const uint8_t* columns = p.codes + part.first_tile * Chunk::kCols + lane % 4 * 4;
#pragma unroll 8
    for (int i = warp; i < part.tiles * kSteps * kGroups; i += weight_stream::kWarps) {
      const int step = i / kGroups, token = i % kGroups * 8 + lane / 4;
      uint32_t low = 0, high = 0;
      if (token < p.m) {
        const uint8_t* from = columns + token * p.padded_k + step * 32;
        low = *reinterpret_cast<const uint32_t*>(from);
        high = *reinterpret_cast<const uint32_t*>(from + 16);
      }
      hopper::U128 fragment;
      widen(low, fragment.x, fragment.y);
      widen(high, fragment.z, fragment.w);
      hopper::store_16(tokens + i * kFragmentBytes + lane * 16, fragment);
    }
  }

  // Halves of the low nibbles of two words, rows r and r + 8: columns (0, 2) and (1, 3) of this lane's four.
  static TILEWRIGHT_DEVICE void take_apart(uint32_t (&a)[4], uint32_t low_row, uint32_t high_row) {
    constexpr uint32_t kMask = 0x87008700u;
    a[0] = low_row << 8 & kMask;
    a[1] = high_row << 8 & kMask;
    a[2] = low_row & kMask;
    a[3] = high_row & kMask;
  }
  static TILEWRIGHT_DEVICE uint32_t rotated(uint32_t word) { return word >> 4 | word << 28; }

  template <int kGroups>
  static TILEWRIGHT_DEVICE void multiply(const StreamParams& p, const Unit& unit, const char* tokens,
                                         float (&sums)[kGroups][4]) {
    const char* fragments = tokens + threadIdx.x % 32 * 16;
    float part[2][kGroups][4] = {};  // of low and of high nibbles: shorter chains
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const hopper::U128& words = unit.codes[step / 2];
      const uint32_t low_row = step % 2 == 0 ? words.x : words.z, high_row = step % 2 == 0 ? words.y : words.w;
      uint32_t low[4], high[4];
      take_apart(low, low_row, high_row);
      take_apart(high, rotated(low_row), rotated(high_row));
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const hopper::U128 b = hopper::load_16(fragments + (step * kGroups + g) * kFragmentBytes);
        hopper::mma_m16n8k16(part[0][g], low, {b.x, b.y}, hopper::f16{});
        hopper::mma_m16n8k16(part[1][g], high, {b.z, b.w}, hopper::f16{});
      }
    }
    float scale[2];
    p.scale_type == format::ScaleType::kBFloat16 ? hopper::unpack_bf16x2(unit.scales, scale[0], scale[1])
                                                 : hopper::unpack_f16x2(unit.scales, scale[0], scale[1]);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[g][i] = fmaf(part[0][g][i] + part[1][g][i], scale[i / 2], sums[g][i]);
    }
  }

  using Output = float;  // what turns sums into y
  static TILEWRIGHT_DEVICE Output output_of(const StreamParams& p, int token) {
    return token < p.m ? 65536.0f * (1.0f / *p.per_tensor_scale) * p.x_scales[token] : 0.0f;
  }

  static TILEWRIGHT_DEVICE void write(const StreamParams& p, Output scale, int64_t row, int token, float sum) {
    if (row >= p.n || token >= p.m) return;
    const float bias = p.bias == nullptr ? 0.0f : load_number(p.bias, row, p.bias_type);
    const int64_t place = token * p.n + row;
    float value = fmaf(sum, scale, bias);
    if (p.residual != nullptr) value += load_number(p.residual, place, p.y_type);
    store_number(p.y, place, p.y_type, value);
  }
};

}  // namespace tilewright::int4_linear
