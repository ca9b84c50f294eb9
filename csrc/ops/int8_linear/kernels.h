// SPDX-License-Identifier: Apache-2.0
// The functions that each ISA level provides. The same order of float operations (one multiply-add a group, groups in
// sequence) on exact integers at every level and for every M: the same bits.
#pragma once

#include "isa/isa.h"
#include "ops/int8_linear/problem.h"

namespace tilewright::int8_linear {

// 32-row blocks [first, last) of the weight; blocks are independent.
using RunBlocks = void (*)(const Problem&, int64_t first, int64_t last);

// One token: x[K] -> codes[2 Kp], group_sums[G]; returns the scale absmax/32512: 1 (with zero codes) for a token whose
// absmax is so small that the scale would be subnormal, NaN (with zero codes) if x has a NaN or infinity.
using PrepareToken = float (*)(const float* x, int64_t k, uint8_t* codes, int32_t* group_sums);

struct Kernels {
  RunBlocks blocks;
  PrepareToken prepare;
};

const Kernels& kernels(isa::Level level);
inline const Kernels& kernels() { return kernels(isa::active()); }

#define TILEWRIGHT_INT8_LINEAR_LEVEL(level)                                      \
  namespace level {                                                              \
  void blocks(const Problem&, int64_t first, int64_t last);                      \
  float prepare(const float* x, int64_t k, uint8_t* codes, int32_t* group_sums); \
  }
TILEWRIGHT_INT8_LINEAR_LEVEL(generic)
TILEWRIGHT_INT8_LINEAR_LEVEL(avx2)
TILEWRIGHT_INT8_LINEAR_LEVEL(avx512)
#undef TILEWRIGHT_INT8_LINEAR_LEVEL

}  // namespace tilewright::int8_linear
