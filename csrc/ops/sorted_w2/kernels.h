// SPDX-License-Identifier: Apache-2.0
// The squared 2-Wasserstein distance between the samples of each column, and its gradient: see README.md.
#pragma once

#include <cstdint>

#include "isa/isa.h"

namespace tilewright::sorted_w2 {

inline constexpr int64_t kMaxSamples = 256;  // n and m; the work is quadratic in them
inline constexpr int64_t kColumns = 16;      // of a block

// Row r of the sorted z meets rows first[r] .. first[r + 1] of this list: `row` of the sorted v, for `share` of the mass.
struct Pair {
  int64_t row;
  double share;
};

template <class T>
struct Problem {
  int64_t n, m, columns;  // 1 <= n, m <= kMaxSamples
  const T* z;  // [n, columns], rows z_stride apart
  int64_t z_stride;
  const T* v;  // [m, columns]
  int64_t v_stride;
  const int64_t* first;  // [n + 1]
  const Pair* pairs;  // [first[n]]
  T* cost;  // [columns]
  T* gradient;  // dcost / dz [n, columns], rows `columns` apart
};

// Columns [kColumns * block, ...) for blocks [from, to).
template <class T>
using Run = void (*)(const Problem<T>&, int64_t from, int64_t to);

namespace generic {
void run(const Problem<float>&, int64_t from, int64_t to);
void run(const Problem<double>&, int64_t from, int64_t to);
}  // namespace generic
namespace avx2 {
void run(const Problem<float>&, int64_t from, int64_t to);
void run(const Problem<double>&, int64_t from, int64_t to);
}  // namespace avx2
namespace avx512 {
void run(const Problem<float>&, int64_t from, int64_t to);
void run(const Problem<double>&, int64_t from, int64_t to);
}  // namespace avx512

template <class T>
Run<T> kernel() {
#if defined(__x86_64__)
  static constexpr isa::Table<Run<T>> table{{generic::run, avx2::run, avx512::run, avx512::run}};
  return table.pick();
#else
  return generic::run;
#endif
}

}  // namespace tilewright::sorted_w2
