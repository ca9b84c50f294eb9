// SPDX-License-Identifier: Apache-2.0
// The functions that each ISA level provides. Every one is called through the table; items and rows are independent, so
// results do not depend on how callers split them among threads.
#pragma once

#include "isa/isa.h"
#include "ops/int4_linear/plan.h"
#include "ops/int4_linear/problem.h"

namespace tilewright::int4_linear {

// Items [first, last) of the plan.
using RunItems = void (*)(const Problem&, const Plan&, int64_t first, int64_t last);

// How a token is cut: `group` columns for a sum (the weight's group), `scale_group` columns for a scale.
struct TokenCut {
  int64_t k, group, scale_group;
};

// One token: x[K] float -> codes[Kp] (int8, or bfloat16 in pair order), scales[A], group_sums[G].
// A scale is absmax/127 or absmax/448 of its columns, 1 where they are all zero. If x has a NaN or infinity anywhere, all
// its scales are NaN and its codes zero.
using PrepareToken = void (*)(const float* x, const TokenCut& cut, void* codes, float* scales, void* group_sums);

struct Kernels {
  RunItems int8_items;
  RunItems fp8_items;
  PrepareToken prepare_int8;
  PrepareToken prepare_fp8;
};

const Kernels& kernels(isa::Level level);
inline const Kernels& kernels() { return kernels(isa::active()); }

// Bytes of one token's prepared codes and of its group sums.
inline int64_t code_bytes(Activation activation, const format::Int4View& weight) {
  return weight.padded_k() * (activation == Activation::kInt8 ? 1 : 2);
}
inline int64_t group_sum_bytes(const format::Int4View& weight) { return weight.groups * 4; }

// A: scales of one token.
inline int64_t token_scales(const format::Int4View& weight, int64_t scale_group) {
  return ceil_div(weight.k, scale_group);
}

#define TILEWRIGHT_INT4_LINEAR_LEVEL(level)                                                   \
  namespace level {                                                                           \
  void int8_items(const Problem&, const Plan&, int64_t first, int64_t last);                  \
  void fp8_items(const Problem&, const Plan&, int64_t first, int64_t last);                   \
  void prepare_int8(const float* x, const TokenCut&, void* codes, float* scales, void* sums); \
  void prepare_fp8(const float* x, const TokenCut&, void* codes, float* scales, void* sums);  \
  }
TILEWRIGHT_INT4_LINEAR_LEVEL(generic)
TILEWRIGHT_INT4_LINEAR_LEVEL(avx2)
TILEWRIGHT_INT4_LINEAR_LEVEL(avx512)
TILEWRIGHT_INT4_LINEAR_LEVEL(avx512_bf16)
#undef TILEWRIGHT_INT4_LINEAR_LEVEL

}  // namespace tilewright::int4_linear
