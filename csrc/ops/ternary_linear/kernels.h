// SPDX-License-Identifier: Apache-2.0
// The functions that each ISA level provides. Items and tokens are independent and sums are integers: results do not
// depend on how callers split them among threads.
#pragma once

#include "isa/isa.h"
#include "ops/ternary_linear/plan.h"
#include "ops/ternary_linear/problem.h"

namespace tilewright::ternary_linear {

// Items [first, last) of the plan.
using RunItems = void (*)(const Problem&, const Plan&, int64_t first, int64_t last);

// One token: x[K] float -> codes[padded K] int8, its scale and the sum of its codes. The scale is max(absmax, 1e-5) / 127
// and a code x / scale rounded half to even. If x has a NaN or an infinity, its scale is NaN and its codes are zero.
using QuantizeToken = void (*)(const float* x, int64_t k, int8_t* codes, float* scale, int32_t* sum);

// Sum of a token's codes; `count` a multiple of kColsPerStep.
using SumToken = int32_t (*)(const int8_t* codes, int64_t count);

// The lookup tables of one token for t3w: [words][3][32], entry i the sum of three activations times the digits of i - 1.
using BuildTables = void (*)(const int8_t* codes, int64_t k, int16_t* tables);

// Rows [first, last) of all tokens.
using Finish = void (*)(const Epilogue&, int64_t first, int64_t last);

struct Kernels {
  RunItems q2;
  RunItems t3w;    // reads Problem::tables; null where the level has no table lookup
  RunItems rows;   // any packing
  QuantizeToken quantize;
  SumToken sum;
  BuildTables tables;
  Finish finish;
};

const Kernels& kernels(isa::Level level);
inline const Kernels& kernels() { return kernels(isa::active()); }

// The kernel for a weight at this level.
inline RunItems kernel_for(const Kernels& level, format::TernaryPacking packing) {
  if (packing == format::TernaryPacking::kQ2) return level.q2;
  return packing == format::TernaryPacking::kT3w && level.t3w != nullptr ? level.t3w : level.rows;
}

inline constexpr int64_t kTableEntries = 32;
inline int64_t table_entries(int64_t k) {
  return format::TernaryT3w::words(k) * format::TernaryT3w::kIndices * kTableEntries;
}

#define TILEWRIGHT_TERNARY_LINEAR_LEVEL(level)                                         \
  namespace level {                                                                    \
  void q2_items(const Problem&, const Plan&, int64_t first, int64_t last);             \
  void quantize(const float* x, int64_t k, int8_t* codes, float* scale, int32_t* sum); \
  int32_t sum(const int8_t* codes, int64_t count);                                     \
  void finish(const Epilogue&, int64_t first, int64_t last);                           \
  }
TILEWRIGHT_TERNARY_LINEAR_LEVEL(generic)
TILEWRIGHT_TERNARY_LINEAR_LEVEL(avx2)
TILEWRIGHT_TERNARY_LINEAR_LEVEL(avx512)
#undef TILEWRIGHT_TERNARY_LINEAR_LEVEL

namespace generic {
void row_items(const Problem&, const Plan&, int64_t first, int64_t last);
}
namespace avx512 {
void t3w_items(const Problem&, const Plan&, int64_t first, int64_t last);
void build_tables(const int8_t* codes, int64_t k, int16_t* tables);
}  // namespace avx512

}  // namespace tilewright::ternary_linear
