// SPDX-License-Identifier: Apache-2.0
// Products of small row-major tiles that stay in the cache, blocked over registers.
//
//   multiply   C = [before +] A B          A [M, depth] with any two strides, so that A^T costs no copy;
//                                          B [depth, N] and C [M, N] with rows of adjacent elements
//   transpose  B = A^T
//
// N is a whole number of vectors: tiles are padded, and a padded row is as long as `leading` says. Every element of C
// is one chain of multiply-adds in the order of depth, whatever M, N and the blocking: the same bits.
#pragma once

#include <cstdint>

#include "core/memory.h"
#include "isa/simd.h"

namespace tilewright {
namespace {

// Elements of a padded row of n: whole cache lines, an odd number of them, so that a column of a tall tile does not fall
// into a few sets of the cache.
template <class T>
constexpr int64_t leading(int64_t n) {
  constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(T));
  return (ceil_div(n, line) | 1) * line;
}

// n rounded up to whole vectors.
template <class T>
constexpr int64_t padded(int64_t n) {
  return round_up(n, Simd<T>::kLanes);
}

// What C held before.
enum class Before {
  kNothing,   // C = A B
  kKeep,      // C += A B
  kScale,     // C = diag(row_scale) C + A B
};

// A kLower is zero above its diagonal, and what lies there is not multiplied.
enum class Shape { kFull, kLower };

// What is added, where it is not C itself.
template <class T>
struct Added {
  const T* row_scale = nullptr;
  const T* before = nullptr;  // null: C
  int64_t stride = 0;         // between rows of before
};

template <class T>
struct Left {
  const T* data;
  int64_t row_stride, column_stride;
};

template <class T>
Left<T> rows_of(const T* data, int64_t stride) {
  return {data, stride, 1};
}

// The transpose of the tile at data.
template <class T>
Left<T> columns_of(const T* data, int64_t stride) {
  return {data, 1, stride};
}

template <class T, int kRows, int kVectors, Before kBefore>
void multiply_block(Left<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t depth, Added<T> added) {
  using S = Simd<T>;
  typename S::V sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      if constexpr (kBefore == Before::kNothing) {
        sum[i][j] = S::zero();
      } else {
        sum[i][j] = S::load(added.before + i * added.stride + j * S::kLanes);
        if constexpr (kBefore == Before::kScale) sum[i][j] = S::mul(sum[i][j], S::set1(added.row_scale[i]));
      }
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    typename S::V row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = S::load(b + d * ldb + j * S::kLanes);
    for (int i = 0; i < kRows; ++i) {
      const typename S::V factor = S::set1(a.data[i * a.row_stride + d * a.column_stride]);
      for (int j = 0; j < kVectors; ++j) sum[i][j] = S::fma(factor, row[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) S::store(c + i * ldc + j * S::kLanes, sum[i][j]);
  }
}

template <class T, int kVectors, Before kBefore, Shape kShape>
void multiply_panel(Left<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t m, int64_t depth, Added<T> added) {
  // Accumulators, the row of B and one broadcast fill the registers.
  constexpr int kTall = Simd<T>::kRegisters == 32 ? 12 : 6;
  int64_t i = 0;
  const auto block = [&]<int kRows>() {
    for (; i + kRows <= m; i += kRows) {
      const int64_t used = kShape == Shape::kLower && i + kRows < depth ? i + kRows : depth;
      multiply_block<T, kRows, kVectors, kBefore>({a.data + i * a.row_stride, a.row_stride, a.column_stride}, b, ldb,
                                                  c + i * ldc, ldc, used,
                                                  {added.row_scale + i, added.before + i * added.stride, added.stride});
    }
  };
  block.template operator()<kTall>();
  if constexpr (kTall > 8) block.template operator()<8>();
  block.template operator()<4>();
  block.template operator()<1>();
}

// C [m, n] from A [m, depth] and B [depth, n]; n a multiple of the vector.
template <Before kBefore, Shape kShape = Shape::kFull, class T>
void multiply(Left<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t m, int64_t n, int64_t depth,
              Added<T> added = {}) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const T* before = added.before == nullptr ? c : added.before;
  const int64_t stride = added.before == nullptr ? ldc : added.stride;
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    multiply_panel<T, 2, kBefore, kShape>(a, b + j, ldb, c + j, ldc, m, depth, {added.row_scale, before + j, stride});
  }
  if (j < n)
    multiply_panel<T, 1, kBefore, kShape>(a, b + j, ldb, c + j, ldc, m, depth, {added.row_scale, before + j, stride});
}

// to [n, m] = from [m, n]^T, both with rows of adjacent elements.
template <class T>
void transpose(const T* from, int64_t ld_from, T* to, int64_t ld_to, int64_t m, int64_t n) {
  constexpr int64_t kSquare = Simd<T>::kLanes;
  for (int64_t i = 0; i < m; i += kSquare) {
    for (int64_t j = 0; j < n; j += kSquare) {
      const T* square = from + i * ld_from + j;
      if constexpr (requires { Simd<T>::transpose_square(square, ld_from, to, ld_to); }) {
        if (i + kSquare <= m && j + kSquare <= n) {
          Simd<T>::transpose_square(square, ld_from, to + j * ld_to + i, ld_to);
          continue;
        }
      }
      for (int64_t c = 0; c < kSquare && j + c < n; ++c) {
        for (int64_t r = 0; r < kSquare && i + r < m; ++r) to[(j + c) * ld_to + i + r] = square[r * ld_from + c];
      }
    }
  }
}

}  // namespace
}  // namespace tilewright
