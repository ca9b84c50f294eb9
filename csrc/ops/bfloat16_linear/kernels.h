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

// y[i] = row list[i] times the one token (M = 1): the same bits as those of `rows`, for rows that lie apart.
using RunListed = void (*)(const Problem&, const int32_t* list, int64_t count);

struct Kernels {
  RunRows rows;
  RunListed listed_rows;
};

#define TILEWRIGHT_BFLOAT16_LINEAR_LEVEL(level)                         \
  namespace level {                                                     \
  void rows(const Problem&, int64_t first, int64_t last);               \
  void listed_rows(const Problem&, const int32_t* list, int64_t count); \
  inline constexpr Kernels kernels{&rows, &listed_rows};                \
  }
TILEWRIGHT_BFLOAT16_LINEAR_LEVEL(generic)
TILEWRIGHT_BFLOAT16_LINEAR_LEVEL(avx2)
TILEWRIGHT_BFLOAT16_LINEAR_LEVEL(avx512)
#undef TILEWRIGHT_BFLOAT16_LINEAR_LEVEL

inline const Kernels& kernels() {
#if defined(__x86_64__)
  static constexpr isa::Table<const Kernels*> table{
      {&generic::kernels, &avx2::kernels, &avx512::kernels, &avx512::kernels}};
  return *table.pick();
#else
  return generic::kernels;
#endif
}

}  // namespace tilewright::bfloat16_linear
