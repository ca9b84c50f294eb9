// SPDX-License-Identifier: Apache-2.0
// FP8 as in the OCP specification: e4m3 ("fn": no infinity, NaN = 0x7f/0xff, largest 448) and e5m2 (IEEE-like,
// largest finite 57344). Encoding rounds to nearest even and saturates finite values and infinities; NaN stays NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace tilewright::format {

template <int kExponentBits, int kMantissaBits, bool kHasInfinity>
struct Fp8 {
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr int kMinExponent = 1 - kBias;                       // of the smallest normal
  static constexpr uint8_t kNan = 0x7f;
  static constexpr uint8_t kMaxCode = kHasInfinity ? 0x7b : 0x7e;      // largest finite magnitude
  static constexpr int kMantissaMask = (1 << kMantissaBits) - 1;

  static float decode(uint8_t code) {
    const float sign = (code & 0x80) != 0 ? -1.0f : 1.0f;
    const int magnitude = code & 0x7f;
    if (magnitude > kMaxCode) {
      const bool infinite = kHasInfinity && magnitude == kMaxCode + 1;
      return infinite ? sign * std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
    }
    const int exponent = magnitude >> kMantissaBits;
    const int mantissa = magnitude & kMantissaMask;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), kMinExponent - kMantissaBits);
    return sign * std::ldexp(static_cast<float>(mantissa + kMantissaMask + 1), exponent - kBias - kMantissaBits);
  }

  // The float nearest to value that the format holds (ties to even), saturated; NaN stays NaN.
  static float round(float value) {
    if (std::isnan(value)) return value;
    const float limit = decode(kMaxCode);
    const float magnitude = std::fabs(value);
    if (magnitude >= limit) return std::copysign(limit, value);
    int exponent = 0;
    std::frexp(magnitude, &exponent);                                  // magnitude in [2^(e-1), 2^e)
    const int ulp_exponent = std::max(exponent - 1, kMinExponent) - kMantissaBits;
    const float ulp = std::ldexp(1.0f, ulp_exponent);
    const float rounded = std::nearbyint(magnitude / ulp) * ulp;       // power-of-two division: exact
    return std::copysign(std::min(rounded, limit), value);
  }

  static uint8_t encode(float value) {
    const uint8_t sign = std::signbit(value) ? 0x80 : 0;
    if (std::isnan(value)) return sign | kNan;
    const float magnitude = std::fabs(round(value));
    if (magnitude == 0.0f) return sign;
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int stored = std::max(exponent - 1, kMinExponent);
    const auto significand = static_cast<int>(std::ldexp(magnitude, kMantissaBits - stored));
    // A subnormal's significand has no hidden bit, so adding the fields carries into the exponent by itself.
    return sign | static_cast<uint8_t>(((stored - kMinExponent) << kMantissaBits) + significand);
  }
};

using E4M3 = Fp8<4, 3, false>;
using E5M2 = Fp8<5, 2, true>;

}  // namespace tilewright::format
