// SPDX-License-Identifier: Apache-2.0
// The kernels as functions over device pointers.
#pragma once

#include <cstdint>

#include "hopper/stream.h"
#include "ops/int4_linear/cuda/plan.h"

namespace tilewright::int4_linear {

enum class Number : uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Tokens to e4m3 with one scale each: absmax / 448, 1 for a token of zeros, NaN (and codes 0) for one that is not finite.
struct QuantizeProblem {
  const void* x;            // [M, K] of `type`
  const void* gate;         // null, or [M, K]: what is rounded is x * silu(gate)
  const void* norm;  // null, or [K]: x is divided by its root mean square (mean square + eps) and multiplied by it
  float eps;
  Number type;
  int64_t m, k, padded_k;  // Kp: K rounded up to 128
  uint8_t* codes;  // [M, Kp], zero behind K
  float* scales;  // [M]
  float* sums;  // null, or [Kp / sub, sums_stride]: sums of `sub` codes of a token
  int64_t sums_stride;  // at least M
  int sub;
  int32_t* counters;  // null, or counters to set to zero for the product that follows
  int64_t counter_count;
};

void quantize_tokens(const QuantizeProblem& problem, hopper::Stream stream);

// y[M, N] = codes * scales . weight^T (+ bias).
struct MatrixProblem {
  format::Int4HopperView weight;
  const uint8_t* blob;  // on the device, header first
  int64_t m;
  const uint8_t* codes = nullptr;  // [M, Kp]
  const float* scales = nullptr;  // [M]
  const float* sums =
      nullptr;  // [Kp / sub, sums_stride] for weights that are not signed; sums_stride a multiple of 128
  int64_t sums_stride = 0;
  const void* bias;  // [N] or null
  Number bias_type;
  const void* residual = nullptr;     // null, or [M, N] of y_type, added before the one rounding of y
  void* y;  // [M, N]
  Number y_type;
  float* pieces;  // plan.piece_slots() * plan.piece_floats()
  int32_t* counters;  // plan.counters(), zero
  bool overlap;  // codes, scales and sums come from the kernel just before: start while it runs
};

void multiply(const MatrixProblem& problem, const DevicePlan& plan, hopper::Stream stream);

int multiprocessors();

}  // namespace tilewright::int4_linear
