// SPDX-License-Identifier: Apache-2.0
#include "emulator/numbers.h"

#include <array>
#include <bit>
#include <cmath>

#include "format/fp8.h"
#include "format/half.h"

namespace tilewright::emulator {
namespace {

std::array<float, 256> all_e4m3() {
  std::array<float, 256> values{};
  for (int code = 0; code < 256; ++code) values[code] = format::E4M3::decode(static_cast<uint8_t>(code));
  return values;
}

}  // namespace

float f16_to_float(uint16_t bits) { return format::f16_to_float(bits); }
float bf16_to_float(uint16_t bits) { return format::bf16_to_float(bits); }
uint16_t float_to_bf16(float value) {
  return std::isnan(value) ? uint16_t{0x7fff} : format::float_to_bf16(value);  // cvt gives the one NaN
}
uint8_t float_to_e4m3(float value) { return std::isnan(value) ? uint8_t{0x7f} : format::E4M3::encode(value); }

float e4m3_to_float(uint8_t bits) {
  static const std::array<float, 256> values = all_e4m3();
  return values[bits];
}

uint16_t float_to_f16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const float magnitude = std::fabs(value);
  if (magnitude == 0.0f) return sign;
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // halfway to the value behind the largest: infinity
  // Adding 2^(e+13) leaves the bits that the format keeps, rounded to nearest even; below 2^-14 the step is 2^-24.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int step = std::max(exponent - 1, -14) - 10;
  const float units = std::nearbyint(std::ldexp(magnitude, -step));
  const int stored = step + 10 + 14;                     // exponent field less one for normal numbers
  return static_cast<uint16_t>(sign | ((stored << 10) + static_cast<int>(units)));
}

}  // namespace tilewright::emulator
