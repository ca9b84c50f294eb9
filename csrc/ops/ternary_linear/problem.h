// SPDX-License-Identifier: Apache-2.0
// acc[M,N] = x[M,K] . w[N,K]^T: ternary weights, INT8 activations, exact 32-bit integers; and what becomes of acc.
#pragma once

#include <cstdint>

#include "format/ternary_blob.h"

namespace tilewright::ternary_linear {

// |acc| <= 128 K, and the codes 0..2 of some packings reach 256 K before the correction.
inline constexpr int64_t kMaxK = (int64_t{1} << 23) - 1;
static_assert(256 * kMaxK < INT32_MAX);

// Columns of x that vector kernels read at once: rows of x are padded with zeros to a multiple.
inline constexpr int64_t kColsPerStep = format::TernaryQ2::kColsPerStep;

struct Problem {
  format::TernaryView weight;  // [N, K]
  int64_t m;
  const int8_t* x;        // [M, x_stride], zero from K on
  int64_t x_stride;       // a multiple of kColsPerStep
  const int32_t* sums;    // [M]: sum of a token's codes
  const int16_t* tables;  // [M, words, 3, 32] for t3w, else null
  int32_t* acc;           // [M, acc_stride], rows from 0
  int64_t acc_stride;     // at least the columns that are written
};

// y = acc * (token_scale * weight_scale) (+ bias), one rounding for the product of the scales and one for the rest.
struct Epilogue {
  int64_t m;
  int64_t stride;               // of acc and y
  const int32_t* acc;           // [M, stride]
  const float* token_scales;    // [M]
  const float* weight_scales;   // [1] or [N]
  bool scale_per_row;
  const float* bias;            // [N] or null
  float* y;                     // [M, stride]; may be acc's own memory
};

}  // namespace tilewright::ternary_linear
