// SPDX-License-Identifier: Apache-2.0
// Numbers whose type is known only when the kernel runs.
#pragma once

#include "hopper/hopper.h"
#include "ops/int4_linear/cuda/launch.h"

namespace tilewright::int4_linear {

TILEWRIGHT_DEVICE float load_number(const void* base, int64_t index, Number type) {
  if (type == Number::kFloat32) return static_cast<const float*>(base)[index];
  const uint16_t bits = static_cast<const uint16_t*>(base)[index];
  return type == Number::kBFloat16 ? hopper::to_float(hopper::bf16{bits}) : hopper::to_float(hopper::f16{bits});
}

TILEWRIGHT_DEVICE void store_number(void* base, int64_t index, Number type, float value) {
  if (type == Number::kFloat32) {
    static_cast<float*>(base)[index] = value;
  } else if (type == Number::kBFloat16) {
    static_cast<hopper::bf16*>(base)[index] = hopper::from_float<hopper::bf16>(value);
  } else {
    static_cast<hopper::f16*>(base)[index] = hopper::from_float<hopper::f16>(value);
  }
}

// Two numbers of 16 bits in a word.
TILEWRIGHT_DEVICE uint32_t pack_pair(float low, float high, Number type) {
  return type == Number::kBFloat16 ? hopper::pack_bf16x2(low, high) : hopper::pack_f16x2(low, high);
}
TILEWRIGHT_DEVICE void unpack_pair(uint32_t word, Number type, float& low, float& high) {
  type == Number::kBFloat16 ? hopper::unpack_bf16x2(word, low, high) : hopper::unpack_f16x2(word, low, high);
}

}  // namespace tilewright::int4_linear
