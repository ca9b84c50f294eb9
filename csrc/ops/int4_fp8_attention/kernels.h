// SPDX-License-Identifier: Apache-2.0
// The functions that each ISA level provides. Items are independent: any thread may run any of them, in any order, and
// the results are the same bits. A run allocates nothing but its thread's scratch memory, once.
#pragma once

#include "isa/isa.h"
#include "ops/int4_fp8_attention/plan.h"
#include "ops/int4_fp8_attention/problem.h"

namespace tilewright::int4_fp8_attention {

// Items [first, last) of the plan.
using RunItems = void (*)(const Problem&, const Plan&, int64_t first, int64_t last);

// Tokens [first, last) of the T packed ones: quantizes (or rounds to bfloat16) and writes them at their positions.
// The caller has made sure that lengths[s] <= capacity.
using AppendTokens = void (*)(const Append&, int64_t first, int64_t last);

struct Kernels {
  RunItems items;
  AppendTokens append;
};

const Kernels& kernels(isa::Level level);
inline const Kernels& kernels() { return kernels(isa::active()); }

#define TILEWRIGHT_INT4_FP8_ATTENTION_LEVEL(level)                      \
  namespace level {                                                     \
  void items(const Problem&, const Plan&, int64_t first, int64_t last); \
  void append(const Append&, int64_t first, int64_t last);              \
  }
TILEWRIGHT_INT4_FP8_ATTENTION_LEVEL(generic)
TILEWRIGHT_INT4_FP8_ATTENTION_LEVEL(avx2)
TILEWRIGHT_INT4_FP8_ATTENTION_LEVEL(avx512)
TILEWRIGHT_INT4_FP8_ATTENTION_LEVEL(avx512_bf16)
#undef TILEWRIGHT_INT4_FP8_ATTENTION_LEVEL

}  // namespace tilewright::int4_fp8_attention
