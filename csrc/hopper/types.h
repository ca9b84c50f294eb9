// SPDX-License-Identifier: Apache-2.0
// Element types of kernels and their conversions: round to nearest even, FP8 saturates, NaN stays NaN.
#pragma once

#include "hopper/platform.h"

namespace tilewright::hopper {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};
// The matrix units' 19-bit form of float32; values travel as float.
struct tf32 {
  float value;
};

// Sixteen bytes that move in one instruction.
struct alignas(16) U128 {
  uint32_t x, y, z, w;
};

#if defined(__CUDACC__)

TILEWRIGHT_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
TILEWRIGHT_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }

TILEWRIGHT_DEVICE float to_float(float value) { return value; }
TILEWRIGHT_DEVICE float to_float(bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
TILEWRIGHT_DEVICE float to_float(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// Two values in one word, the first in the low half.
TILEWRIGHT_DEVICE uint32_t pack_bf16x2(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
TILEWRIGHT_DEVICE uint32_t pack_f16x2(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
TILEWRIGHT_DEVICE uint16_t pack_e4m3x2(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
TILEWRIGHT_DEVICE uint32_t pack_e4m3x4(float a0, float a1, float a2, float a3) {
  return pack_e4m3x2(a0, a1) | static_cast<uint32_t>(pack_e4m3x2(a2, a3)) << 16;
}

TILEWRIGHT_DEVICE void unpack_f16x2(uint32_t word, float& low, float& high) {
  low = to_float(f16{static_cast<uint16_t>(word)});
  high = to_float(f16{static_cast<uint16_t>(word >> 16)});
}
TILEWRIGHT_DEVICE uint32_t e4m3x2_to_f16x2(uint16_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return halves;
}
TILEWRIGHT_DEVICE void unpack_e4m3x4(uint32_t word, float (&values)[4]) {
  unpack_f16x2(e4m3x2_to_f16x2(static_cast<uint16_t>(word)), values[0], values[1]);
  unpack_f16x2(e4m3x2_to_f16x2(static_cast<uint16_t>(word >> 16)), values[2], values[3]);
}
TILEWRIGHT_DEVICE float to_float(e4m3 value) {
  return to_float(f16{static_cast<uint16_t>(e4m3x2_to_f16x2(value.bits))});
}

// The nearest value that the matrix units see unchanged; without it they drop the low 13 bits.
TILEWRIGHT_DEVICE float round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

#else
#include "emulator/types.h"
#endif

TILEWRIGHT_DEVICE void unpack_bf16x2(uint32_t word, float& low, float& high) {
  low = bits_float(word << 16);
  high = bits_float(word & 0xffff0000u);
}

template <class T>
TILEWRIGHT_DEVICE T from_float(float value);
template <>
TILEWRIGHT_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
TILEWRIGHT_DEVICE bf16 from_float<bf16>(float value) {
  return {static_cast<uint16_t>(pack_bf16x2(value, 0.0f))};
}
template <>
TILEWRIGHT_DEVICE f16 from_float<f16>(float value) {
  return {static_cast<uint16_t>(pack_f16x2(value, 0.0f))};
}
template <>
TILEWRIGHT_DEVICE e4m3 from_float<e4m3>(float value) {
  return {static_cast<uint8_t>(pack_e4m3x2(value, 0.0f))};
}

// Two values in one word as T has them.
template <class T>
TILEWRIGHT_DEVICE uint32_t pack_pair(float low, float high);
template <>
TILEWRIGHT_DEVICE uint32_t pack_pair<bf16>(float low, float high) {
  return pack_bf16x2(low, high);
}
template <>
TILEWRIGHT_DEVICE uint32_t pack_pair<f16>(float low, float high) {
  return pack_f16x2(low, high);
}

template <class T>
TILEWRIGHT_DEVICE void unpack_pair(uint32_t word, float& low, float& high);
template <>
TILEWRIGHT_DEVICE void unpack_pair<bf16>(uint32_t word, float& low, float& high) {
  unpack_bf16x2(word, low, high);
}
template <>
TILEWRIGHT_DEVICE void unpack_pair<f16>(uint32_t word, float& low, float& high) {
  unpack_f16x2(word, low, high);
}

}  // namespace tilewright::hopper
