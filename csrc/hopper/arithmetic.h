// SPDX-License-Identifier: Apache-2.0
// Single instructions of the arithmetic units that CUDA C++ has no name for.
#pragma once

#include "hopper/types.h"

namespace tilewright::hopper {

#if defined(__CUDACC__)

// (word & mask) | bits in one instruction, both constants kept in registers: left to itself the compiler takes two,
// with a constant in each.
TILEWRIGHT_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// a - b in each half of a word, rounded to nearest even.
TILEWRIGHT_DEVICE uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}

// 2^x within 2^-22 of itself; results below 2^-126 are 0. exp2f spends three more instructions on those.
TILEWRIGHT_DEVICE float exp2_flushed(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#else

TILEWRIGHT_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }

TILEWRIGHT_DEVICE uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
  float a_low, a_high, b_low, b_high;
  unpack_bf16x2(a, a_low, a_high);
  unpack_bf16x2(b, b_low, b_high);
  return pack_bf16x2(a_low - b_low, a_high - b_high);
}

TILEWRIGHT_DEVICE float exp2_flushed(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

#endif

}  // namespace tilewright::hopper
