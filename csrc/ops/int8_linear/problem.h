// SPDX-License-Identifier: Apache-2.0
// y[M,N] = x[M,K] . weight[N,K]^T: INT8 weights in groups of 32, activations quantized per token to 16 bits.
//
// Meant for the output head of a language model, read once a token. Sixteen bits cost nothing there: the weight stream is
// the bound, and a 16-bit activation is two signed bytes (x = 256 high + low), so two byte dot products on one load of
// weights. What is lost, half of absmax/32512 a value, is 256 times below INT8.
#pragma once

#include <cstdint>

#include "format/int8.h"

namespace tilewright::int8_linear {

// |x| <= 127 * 256, so that both bytes are signed bytes.
inline constexpr float kActivationLimit = 32512.0f;

// Activations as the level's own kernel reads them, written by its prepare function.
struct ActivationView {
  const uint8_t* codes;  // [M, 2 Kp] bytes, opaque
  const float* scales;  // [M]
  const int32_t* group_sums;  // [M, G]: sum of a group's 16-bit codes
};

struct Problem {
  format::Int8View weight;  // [N, K]
  int64_t m;
  ActivationView x;
  float* y;  // [M, N]
  int64_t y_stride;  // elements between rows of y
};

// Products of a group in 32 bits: 32 * 128 * 32512 and, for the bytes, 32 * 255 * 128 * 256.
static_assert(int64_t{format::Int8::kGroup} * 255 * 128 * 256 < INT32_MAX);

}  // namespace tilewright::int8_linear
