// SPDX-License-Identifier: Apache-2.0
// The functions that each level provides. Tasks are independent: any thread may run any of them, in any order, and the
// results are the same bits. A run allocates nothing but its thread's scratch memory, once.
#pragma once

#include "isa/isa.h"
#include "ops/linear_attention/problem.h"

namespace tilewright::linear_attention {

template <class T>
struct Kernels {
  // Task (n * bands + band) * parts + part, bands = ceil(value_heads / Problem::band).
  void (*chunk)(const Problem<T>&, int64_t task);
  // Task (n * value_heads + j) * parts + part.
  void (*recurrent)(const Problem<T>&, int64_t task);
  // Task n * value_heads + j. Of the problem it reads inputs and checkpoints.
  void (*backward)(const Problem<T>&, const Gradients<T>&, int64_t task);
};

template <class T>
const Kernels<T>& kernels(isa::Level level);
template <class T>
const Kernels<T>& kernels() {
  return kernels<T>(isa::active());
}

// The calling thread's memory for a task, of this many bytes; the next call may move it. Out of line, so that no level's
// file defines a function that another file could be linked against.
void* thread_memory(int64_t bytes);

// Data, not functions: reading them runs no instruction of their level.
#define TILEWRIGHT_LINEAR_ATTENTION_LEVEL(level) \
  namespace level {                              \
  extern const Kernels<float> kFloat;            \
  extern const Kernels<double> kDouble;          \
  }
TILEWRIGHT_LINEAR_ATTENTION_LEVEL(generic)
TILEWRIGHT_LINEAR_ATTENTION_LEVEL(avx2)
TILEWRIGHT_LINEAR_ATTENTION_LEVEL(avx512)
#undef TILEWRIGHT_LINEAR_ATTENTION_LEVEL

}  // namespace tilewright::linear_attention
