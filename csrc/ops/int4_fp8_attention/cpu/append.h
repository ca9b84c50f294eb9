// SPDX-License-Identifier: Apache-2.0
// Tokens into the cache, in loops that each level's compiler flags turn into its vectors. Level is a type of the
// including file alone, so that no two levels share an instantiation.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>

#include "ops/int4_fp8_attention/problem.h"

namespace tilewright::int4_fp8_attention {

template <class Level>
struct Appender {
  // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
  static constexpr float kRound = 12582912.0f;
  static constexpr int32_t kRoundBits = 0x4b400000;
  static constexpr uint32_t kMagnitude = 0x7fffffffu;
  static constexpr uint32_t kInfinity = 0x7f800000u;

  // Returns the scale as the cache stores it: in the low 16 bits for bfloat16.
  static uint32_t stored_scale(const float* x, int64_t count, format::ScaleType type) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & kMagnitude);
    float scale = std::max(std::bit_cast<float>(largest), format::Int4Kv::kLeastAbsmax) /
                  static_cast<float>(format::Int4Kv::kMaxCode);
    if (largest >= kInfinity) scale = std::bit_cast<float>(kInfinity | 1u << 22);
    return type == format::ScaleType::kFloat32 ? std::bit_cast<uint32_t>(scale)
                                               : uint32_t{format::float_to_bf16(scale)};
  }

  static void round_codes(const float* x, int64_t count, float scale, int32_t* codes) {
    if (!(scale < std::bit_cast<float>(kInfinity))) {
      std::fill(codes, codes + count, 0);
      return;
    }
    constexpr int32_t kMax = format::Int4Kv::kMaxCode;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t code = std::bit_cast<int32_t>(x[i] / scale + kRound) - kRoundBits;
      codes[i] = std::clamp(code, -kMax, kMax);
    }
  }

  static void quantize_row(const float* x, int64_t head_dim, format::ScaleType type, uint8_t* row, uint8_t* scales) {
    alignas(64) int32_t codes[kMaxHeadDim + 1];
    const int64_t scale_bytes = format::scale_bytes(type);
    for (int64_t first = 0; first < head_dim; first += format::Int4Kv::kGroup) {
      const int64_t count = std::min<int64_t>(format::Int4Kv::kGroup, head_dim - first);
      const uint32_t stored = stored_scale(x + first, count, type);
      std::memcpy(scales + first / format::Int4Kv::kGroup * scale_bytes, &stored, static_cast<size_t>(scale_bytes));
      const float scale = std::bit_cast<float>(type == format::ScaleType::kFloat32 ? stored : stored << 16);
      round_codes(x + first, count, scale, codes + first);
    }
    codes[head_dim] = 0;
    for (int64_t i = 0; i < format::Int4Kv::row_bytes(head_dim); ++i) {
      row[i] = format::Int4Kv::pair(codes[2 * i], codes[2 * i + 1]);
    }
  }

  static void round_row(const float* x, int64_t head_dim, uint8_t* row) {
    alignas(64) uint16_t rounded[kMaxHeadDim];
    for (int64_t i = 0; i < head_dim; ++i) rounded[i] = format::float_to_bf16(x[i]);
    std::memcpy(row, rounded, static_cast<size_t>(2 * head_dim));
  }

  static void token(const Append& a, int64_t t, int64_t sequence, int64_t position) {
    const Cache& c = a.cache;
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t source = t * a.token_stride + h * a.head_stride;
      const int64_t at = sequence * c.data.sequence + h * c.data.head + position * c.data.token;
      if (c.format == CacheFormat::kBFloat16) {
        round_row(a.k + source, c.head_dim, c.k + at);
        round_row(a.v + source, c.head_dim, c.v + at);
        continue;
      }
      const int64_t scale_at = sequence * c.scales.sequence + h * c.scales.head + position * c.scales.token;
      quantize_row(a.k + source, c.head_dim, c.scale_type, c.k + at, c.k_scales + scale_at);
      quantize_row(a.v + source, c.head_dim, c.scale_type, c.v + at, c.v_scales + scale_at);
    }
  }

  static void run(const Append& a, int64_t first, int64_t last) {
    int64_t s = 0;
    for (int64_t t = first; t < last; ++t) {
      while (a.packed.cu_seqlens[s + 1] <= t) ++s;
      token(a, t, s, a.packed.lengths[s] - (a.packed.cu_seqlens[s + 1] - t));
    }
  }
};

}  // namespace tilewright::int4_fp8_attention
