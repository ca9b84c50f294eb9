// SPDX-License-Identifier: Apache-2.0
// y[M,N] = x[M,K] . weight[N,K]^T: bfloat16 weights, float32 activations, products and sums in float32.
//
// Column k goes to partial sum k mod 32, in order; the 32 sums are added by halving. The same at every level and for
// every M: the same bits. Error of an element: (K/32 + 6) * 2^-24 * sum |x_k w_k|. Reads 2 N K bytes once for M <= 4.
#pragma once

#include "format/bfloat16.h"
#include "isa/isa.h"

namespace tilewright::bfloat16_linear {

struct Problem {
  format::BFloat16View weight;   // [N, Kp]
  int64_t m;
  const float* x;                // [M, Kp], tail zero
  float* y;                      // [M, N]
  int64_t y_stride;              // elements between rows of y
};

// Rows [first, last) of the weight; rows are independent.
using RunRows = void (*)(const Problem&, int64_t first, int64_t last);

namespace generic {
void rows(const Problem&, int64_t first, int64_t last);
}
namespace avx2 {
void rows(const Problem&, int64_t first, int64_t last);
}
namespace avx512 {
void rows(const Problem&, int64_t first, int64_t last);
}

inline RunRows kernel() {
#if defined(__x86_64__)
  static constexpr isa::Table<RunRows> table{{generic::rows, avx2::rows, avx512::rows, avx512::rows}};
  return table.pick();
#else
  return generic::rows;
#endif
}

}  // namespace tilewright::bfloat16_linear
