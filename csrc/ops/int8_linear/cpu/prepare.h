// SPDX-License-Identifier: Apache-2.0
// Quantizing one token to 16 bits, written once for all levels; put(k, code) lays the code down.
#pragma once

#include <cfloat>
#include <cmath>
#include <limits>

#include "isa/lanes.h"
#include "ops/int8_linear/problem.h"

namespace tilewright::int8_linear {
namespace {

TILEWRIGHT_INLINE float absmax(const float* x, int64_t k) {
  // Compared as integers, where NaN and infinity are the largest magnitudes.
  IntLanes largest = {};
  const auto take = [&](const Lanes& value) {
    IntLanes bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  };
  const int64_t whole = k - k % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) take(load_lanes(x + i));
  if (whole < k) take(load_first_lanes(x + whole, k - whole));
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = largest[i] > bits ? largest[i] : bits;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Calls put(k, codes) for each 16 columns up to Kp, codes as 32-bit lanes.
template <class Put>
TILEWRIGHT_INLINE float prepare_token(const float* x, int64_t k, int32_t* group_sums, const Put& put) {
  const float largest = absmax(x, k);
  const bool finite = largest <= FLT_MAX;
  const bool zero = !finite || largest < FLT_MIN * kActivationLimit;
  const float scale = finite ? (zero ? 1.0f : largest / kActivationLimit) : std::numeric_limits<float>::quiet_NaN();
  const int64_t groups = ceil_div(k, format::Int8::kGroup);
  for (int64_t g = 0; g < groups; ++g) {
    IntLanes sums = {};
    for (int64_t i = g * format::Int8::kGroup; i < (g + 1) * format::Int8::kGroup; i += kLanes) {
      IntLanes codes = {};
      if (!zero && i < k) {
        const Lanes quotient = (k - i >= kLanes ? load_lanes(x + i) : load_first_lanes(x + i, k - i)) / scale;
        // 1.5 * 2^23 rounds to the nearest integer, ties to even; exact below 2^22.
        codes = __builtin_convertvector((quotient + 0x1.8p23f) - 0x1.8p23f, IntLanes);
      }
      put(i, codes);
      sums += codes;
    }
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    group_sums[g] = sum;
  }
  return scale;
}

}  // namespace
}  // namespace tilewright::int8_linear
