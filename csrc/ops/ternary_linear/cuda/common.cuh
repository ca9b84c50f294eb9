// SPDX-License-Identifier: Apache-2.0
// What both matrix kernels share: decoding a word of weights, and turning sums into results.
#pragma once

#include "hopper/hopper.h"
#include "ops/ternary_linear/cuda/launch.h"

namespace tilewright::ternary_linear::cuda {

using format::TernaryMma2;

// The four registers of a 16 x 32 fragment, each four signed bytes of 64 w.
TILEWRIGHT_DEVICE void decode(uint32_t word, uint32_t (&fragment)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) fragment[i] = (word << (2 * i)) & TernaryMma2::kMask;
}

// Sums of 64 w x are multiples of 64: exact.
TILEWRIGHT_DEVICE int32_t unscaled(int32_t sum) { return sum >> TernaryMma2::kScaleBits; }

TILEWRIGHT_DEVICE float finished(const Output& out, int32_t acc, float scale, int64_t n) {
  const auto value = static_cast<float>(acc);
  return out.bias != nullptr ? fmaf(value, scale, out.bias[n]) : value * scale;
}

// Results of rows n and n + 1 of one token, scales already multiplied. `paired`: both rows exist and N is even, so that
// they are one aligned store.
TILEWRIGHT_DEVICE void store_pair(const Output& out, int64_t at, int64_t n, int32_t first, int32_t second,
                                  const float (&scale)[2], bool paired, bool has_second) {
  if (out.element == Element::kInt32) {
    auto* y = static_cast<int32_t*>(out.y) + at;
    if (paired) {
      *reinterpret_cast<int2*>(y) = make_int2(first, second);
      return;
    }
    y[0] = first;
    if (has_second) y[1] = second;
    return;
  }
  const float low = finished(out, first, scale[0], n);
  const float high = has_second ? finished(out, second, scale[1], n + 1) : 0.0f;
  if (out.element == Element::kFloat) {
    auto* y = static_cast<float*>(out.y) + at;
    if (paired) {
      *reinterpret_cast<float2*>(y) = make_float2(low, high);
      return;
    }
    y[0] = low;
    if (has_second) y[1] = high;
    return;
  }
  const uint32_t pair =
      out.element == Element::kBFloat16 ? hopper::pack_bf16x2(low, high) : hopper::pack_f16x2(low, high);
  auto* y = static_cast<uint16_t*>(out.y) + at;
  if (paired) {
    *reinterpret_cast<uint32_t*>(y) = pair;
    return;
  }
  y[0] = static_cast<uint16_t>(pair);
  if (has_second) y[1] = static_cast<uint16_t>(pair >> 16);
}

}  // namespace tilewright::ternary_linear::cuda
