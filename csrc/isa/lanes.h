// SPDX-License-Identifier: Apache-2.0
// Sixteen float lanes in the compiler's own vector type, for kernels simple enough to be written once: a level's file
// compiles the same body for its instructions, lane by lane the same operations, hence the same bits at every level.
// In an unnamed namespace for the reason given in vec_avx512.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace tilewright {
namespace {

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

using Lanes = float __attribute__((vector_size(64)));
using IntLanes = int32_t __attribute__((vector_size(64)));
inline constexpr int kLanes = 16;

#define TILEWRIGHT_INLINE inline __attribute__((always_inline))

TILEWRIGHT_INLINE Lanes load_lanes(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

TILEWRIGHT_INLINE void store_lanes(float* p, const Lanes& v) { std::memcpy(p, &v, sizeof(v)); }

// The first n lanes, zero elsewhere.
TILEWRIGHT_INLINE Lanes load_first_lanes(const float* p, int64_t n) {
  Lanes v = {};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
}

TILEWRIGHT_INLINE void store_first_lanes(float* p, const Lanes& v, int64_t n) {
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
}

TILEWRIGHT_INLINE Lanes all_lanes(float value) { return value - Lanes{}; }

// Halves added until one is left: a fixed order.
TILEWRIGHT_INLINE float sum_lanes(const Lanes& v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// e^x within 2 units in the last place for x in [-87, 88]; x is clamped to that, NaN stays NaN.
TILEWRIGHT_INLINE Lanes exp_lanes(const Lanes& value) {
  Lanes x = value < -87.0f ? all_lanes(-87.0f) : value;
  x = x > 88.0f ? all_lanes(88.0f) : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer n, which then sits in the low bits.
  const Lanes shifted = x * 0x1.715476p+0f + 0x1.8p23f;
  const Lanes n = shifted - 0x1.8p23f;
  // ln 2 in two parts, the first short enough that n * part is exact.
  const Lanes r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
  Lanes p = r * 0x1.a01a02p-13f + 0x1.6c16c2p-10f;
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = (p * r) * r + (r + 1.0f);
  IntLanes exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent + 127) << 23;   // the bits of 1.5 * 2^23 itself fall out at the top
  Lanes power;
  std::memcpy(&power, &exponent, sizeof(power));
  return p * power;
}

}  // namespace
}  // namespace tilewright
