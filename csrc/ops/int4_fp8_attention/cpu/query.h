// SPDX-License-Identifier: Apache-2.0
// One row of queries as the left operand of the score product.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "ops/int4_fp8_attention/cpu/shape.h"

namespace tilewright::int4_fp8_attention {

// The e4m3 value nearest to x, ties to even, saturated at 448. Branch-free, so that it becomes vector code.
template <class Isa>
float round_e4m3(float x) {
  constexpr uint32_t kSign = 0x80000000u, kKeptBits = 0xfff00000u, kHalf = 0x0007ffffu;
  constexpr int kDroppedBits = 20;
  constexpr float kSmallestNormal = 0x1p-6f, kLargest = 448.0f;
  constexpr float kSubnormalRound = 0x1p14f;   // whose last bit is worth 2^-9, the spacing of subnormals
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & ~kSign;
  const float normal = std::bit_cast<float>((magnitude + kHalf + (magnitude >> kDroppedBits & 1u)) & kKeptBits);
  const float absolute = std::bit_cast<float>(magnitude);
  const float subnormal = (absolute + kSubnormalRound) - kSubnormalRound;
  const float rounded = std::min(absolute < kSmallestNormal ? subnormal : normal, kLargest);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(rounded) | (bits & kSign));
}

// Writes key_depth units for each term of the query and returns what turns its product with the integers or bfloat16 of
// K into a score in base-2 units: scale of q times softmax scale times log2(e), never negative (the sign moves to q).
template <class Isa>
float prepare_query(const Problem& p, const Shape& shape, const float* source, typename Isa::Unit* out) {
  constexpr float kLog2e = 1.44269504088896341f, kFp8Limit = 448.0f;
  constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
  constexpr int64_t kPadding = 64;   // whole vectors of any level
  alignas(64) float q[kMaxHeadDim + kPadding];
  const int64_t d = shape.head_dim, padded = round_up(d, kPadding);
  std::fill(q + padded - kPadding, q + padded, 0.0f);
  const float sign = p.scale < 0.0f ? -1.0f : 1.0f;
  for (int64_t i = 0; i < d; ++i) q[i] = source[i] * sign;
  float scale = 1.0f;
  if (p.query == Query::kFp8) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < d; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(q[i]) & kMagnitude);
    if (largest >= kInfinity) {
      scale = std::numeric_limits<float>::quiet_NaN();
      std::fill(q, q + d, 0.0f);
    } else {
      const float ratio = std::bit_cast<float>(largest) / kFp8Limit;
      scale = ratio > 0.0f ? ratio : 1.0f;
      for (int64_t i = 0; i < d; ++i) q[i] = round_e4m3<Isa>(q[i] / scale);
    }
  }
  Isa::pack_query(shape, q, out);
  return scale * std::fabs(p.scale) * kLog2e;
}

}  // namespace tilewright::int4_fp8_attention
