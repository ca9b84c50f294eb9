// SPDX-License-Identifier: Apache-2.0
// The functions that each ISA level provides; one body, hence the same bits at every level. Items are independent.
#pragma once

#include "isa/isa.h"
#include "ops/sparse_gated_mlp/problem.h"

namespace tilewright::sparse_gated_mlp {

// n values z -> act(z), kept[i] = not |act(z_i)| < threshold, 0 where not kept. In place allowed. The threshold is
// compared with the float32 activation that is returned, before any rounding to a narrower type; a NaN is kept.
// Relative error below 6 units in the last place of float32; of GELU's tanh form 6 |2u| more, e^2u being its tail.
using Activate = void (*)(Function, const float* z, const float* threshold, int64_t threshold_stride, int64_t n,
                          float* a, uint8_t* kept);

template <class Weight>
struct Kernels {
  // activation and kept of neurons [first, last).
  void (*gate)(const Problem<Weight, float>&, int64_t first, int64_t last);
  // h of listed rows [first, last).
  void (*up)(const Problem<Weight, float>&, int64_t first, int64_t last);
  // y of columns [first, last); workspace: workspace_floats() floats.
  void (*down)(const Problem<Weight, float>&, int64_t first, int64_t last, float* workspace);
};

// Of `down` for an item of so many columns: one partial sum for each class, token of a tile and column.
int64_t workspace_floats(int64_t tokens, int64_t columns);

#define TILEWRIGHT_SPARSE_GATED_MLP_LEVEL(level)                                                                 \
  namespace level {                                                                                              \
  extern const Kernels<float> float_kernels;                                                                     \
  extern const Kernels<uint16_t> bfloat16_kernels;                                                               \
  void activate(Function, const float* z, const float* threshold, int64_t threshold_stride, int64_t n, float* a, \
                uint8_t* kept);                                                                                  \
  }
TILEWRIGHT_SPARSE_GATED_MLP_LEVEL(generic)
TILEWRIGHT_SPARSE_GATED_MLP_LEVEL(avx2)
TILEWRIGHT_SPARSE_GATED_MLP_LEVEL(avx512)
#undef TILEWRIGHT_SPARSE_GATED_MLP_LEVEL

template <class Weight>
const Kernels<Weight>& kernels();
Activate activate();

}  // namespace tilewright::sparse_gated_mlp
