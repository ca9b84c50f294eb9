// SPDX-License-Identifier: Apache-2.0
// The functions that each ISA level provides. Items are independent: any thread may run any of them, in any order, and
// the results are the same bits.
#pragma once

#include "isa/isa.h"
#include "ops/local_linear_attention/plan.h"
#include "ops/local_linear_attention/problem.h"

namespace tilewright::local_linear_attention {

template <class T>
struct Kernels {
  // Blocks [first, last) of the plan.
  void (*forward)(const Forward<T>&, const Plan&, int64_t first, int64_t last);
  // Blocks: dq, dridge or dx, and what the keys' pass needs of a row.
  void (*backward_queries)(const Backward<T>&, const Plan&, int64_t first, int64_t last);
  // Key items, once all blocks are done: dk and dv.
  void (*backward_keys)(const Backward<T>&, const Plan&, int64_t first, int64_t last);
};

#define TILEWRIGHT_LOCAL_LINEAR_ATTENTION_LEVEL(level) \
  namespace level {                                    \
  extern const Kernels<float> kFloat;                  \
  extern const Kernels<double> kDouble;                \
  }
TILEWRIGHT_LOCAL_LINEAR_ATTENTION_LEVEL(generic)
TILEWRIGHT_LOCAL_LINEAR_ATTENTION_LEVEL(avx2)
TILEWRIGHT_LOCAL_LINEAR_ATTENTION_LEVEL(avx512)
#undef TILEWRIGHT_LOCAL_LINEAR_ATTENTION_LEVEL

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
template <>
const Kernels<double>& kernels<double>();

}  // namespace tilewright::local_linear_attention
