// SPDX-License-Identifier: Apache-2.0
// y[M,N] = act(x)[M,K] . weight[N,K]^T (+ bias): INT4 weights, INT8 or FP8 activations quantized per token.
#pragma once

#include <cstdint>

#include "format/int4.h"

namespace tilewright::int4_linear {

enum class Activation : uint8_t { kInt8 = 0, kFp8 = 1 };

// Exact: integers times activations, group scales on the partial sums. Fold: each weight first becomes e4m3(q * scale),
// as on hardware that multiplies FP8 by FP8 (FireQ, Fig. 2).
enum class Mode : uint8_t { kExact = 0, kFold = 1 };

// Activations as the kernels read them; prepare_activation() writes them. Kp = K rounded up to 8, tail zero.
struct ActivationView {
  const void* codes;        // int8 [M, Kp], or bfloat16 [M, Kp] in pair order (see activation.h)
  const float* scales;      // [M, A]: A = ceil(K / scale_group), one when a whole token shares a scale
  const void* group_sums;   // [M, G]: sum of a group's codes; int32 for INT8, float for FP8
};

struct Problem {
  format::Int4View weight;  // [N, K]
  Activation activation;
  Mode mode;
  int64_t m;
  int64_t scale_group;      // columns of x that share a scale: a multiple of weight.group, or at least K
  ActivationView x;
  const float* bias;        // [N] or null
  float* y;                 // [M, N]
  int64_t y_stride;         // elements between rows of y
};

}  // namespace tilewright::int4_linear
