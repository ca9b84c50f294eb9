// SPDX-License-Identifier: Apache-2.0
// (Cov + lambda I) x = right of one row, by conjugate gradients or by moments and Cholesky.
#pragma once

#include "ops/local_linear_attention/cuda/row.cuh"

namespace tilewright::local_linear_attention::cuda {

struct Solved {
  double residual;  // |residual| / |right|
  int32_t iterations;
};

// image = (Cov + lambda I) from: keys are taken from the mean itself, so that nothing cancels.
template <class T>
TILEWRIGHT_DEVICE void apply(const Row<T>& row, const T* from) {
  const RowMemory<T>& m = row.m;
  const T shift = dot(row, m.mean, from);
  clear(m.image, row.key_size);
  walk(
      row,
      [&](int64_t j, int) {
        const T* key = row.key(j);
        return weight(row, key) * row.inverse * (along(row, from, key) - shift);
      },
      [&](int64_t first, int n) {
        for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) {
          T sum = m.image[d];
          for (int j = 0; j < n; ++j) sum += m.tile[j] * (row.key(first + j)[d] - m.centre[d] - m.mean[d]);
          m.image[d] = sum;
        }
      });
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) m.image[d] += row.lambda * from[d];
  __syncthreads();
}

// The diagonal of Cov + lambda I, inverted; 1 without preconditioner.
template <class T>
TILEWRIGHT_DEVICE void precondition(const Row<T>& row) {
  const RowMemory<T>& m = row.m;
  const T none = row.options.jacobi ? T{0} : T{1};
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) m.diagonal[d] = none;
  __syncthreads();
  if (!row.options.jacobi) return;
  walk(
      row, [&](int64_t j, int) { return weight(row, row.key(j)) * row.inverse; },
      [&](int64_t first, int n) {
        for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) {
          T sum = m.diagonal[d];
          for (int j = 0; j < n; ++j) {
            const T z = row.key(first + j)[d] - m.centre[d] - m.mean[d];
            sum += m.tile[j] * z * z;
          }
          m.diagonal[d] = sum;
        }
      });
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) m.diagonal[d] = T{1} / (m.diagonal[d] + row.lambda);
  __syncthreads();
}

// x, where to begin, becomes its best multiple: the step along it that an iteration would take, from zero.
template <class T>
TILEWRIGHT_DEVICE void begin(const Row<T>& row, const T* right, T* x, bool warm) {
  const RowMemory<T>& m = row.m;
  T step = 0;
  if (warm) {
    apply(row, x);
    const T numerator = dot(row, x, right);
    step = numerator / dot(row, x, m.image);
    if (!finite(step)) step = T{0};
  }
  const bool moves = step != T{0};
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) {
    m.left[d] = moves ? right[d] - step * m.image[d] : right[d];
    x[d] = moves ? step * x[d] : T{0};
    m.direction[d] = m.left[d] * m.diagonal[d];
  }
  __syncthreads();
}

template <class T>
TILEWRIGHT_DEVICE int32_t iterate(const Row<T>& row, const T* right, T* x, bool warm) {
  const RowMemory<T>& m = row.m;
  const T rtol = static_cast<T>(row.options.rtol);
  precondition(row);
  begin(row, right, x, warm);
  T square = dot(row, m.left, m.direction);
  const T limit = rtol * rtol * dot(row, right, right);
  if (!(dot(row, m.left, m.left) > limit)) return 0;
  for (int32_t i = 0; i < row.options.max_iterations; ++i) {
    apply(row, m.direction);
    const T curvature = dot(row, m.direction, m.image);
    if (!(curvature > T{0})) return i;  // rounding or NaN: nothing to be gained along this direction
    const T step = square / curvature;
    for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) {
      x[d] += step * m.direction[d];
      m.left[d] -= step * m.image[d];
    }
    if (!(dot(row, m.left, m.left) > limit)) return i + 1;
    T sum = 0;
    for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) sum += m.left[d] * m.left[d] * m.diagonal[d];
    sum = block_sum(sum, m.sums);
    const T ratio = sum / square;
    for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) {
      m.direction[d] = m.left[d] * m.diagonal[d] + ratio * m.direction[d];
    }
    square = sum;
    __syncthreads();
  }
  return static_cast<int32_t>(row.options.max_iterations);
}

TILEWRIGHT_DEVICE int64_t triangle(int64_t row, int64_t column) { return row * (row + 1) / 2 + column; }

// matrix = Cov + lambda I in double, its lower triangle. Element e is (a, b), found by walking along.
template <class T>
TILEWRIGHT_DEVICE void gather_moments(const Row<T>& row) {
  const RowMemory<T>& m = row.m;
  const int64_t size = row.key_size, elements = size * (size + 1) / 2;
  for (int64_t e = threadIdx.x; e < elements; e += kThreads) m.matrix[e] = 0.0;
  walk(
      row, [&](int64_t j, int) { return weight(row, row.key(j)) * row.inverse; },
      [&](int64_t first, int n) {
        int64_t a = 0, b = threadIdx.x;
        for (int64_t e = threadIdx.x; e < elements; e += kThreads) {
          while (b > a) {
            b -= a + 1;
            ++a;
          }
          const T at_a = m.centre[a] + m.mean[a], at_b = m.centre[b] + m.mean[b];
          double sum = m.matrix[e];
          for (int j = 0; j < n; ++j) {
            const T* key = row.key(first + j);
            sum += static_cast<double>(m.tile[j]) * static_cast<double>(key[a] - at_a) *
                   static_cast<double>(key[b] - at_b);
          }
          m.matrix[e] = sum;
          b += kThreads;
        }
      });
  for (int64_t d = threadIdx.x; d < size; d += kThreads) m.matrix[triangle(d, d)] += static_cast<double>(row.lambda);
  __syncthreads();
}

// The factor in place, with the reciprocal of its diagonal. A pivot that rounding has made smaller than what rounding can
// make is raised to that.
template <class T>
TILEWRIGHT_DEVICE void factorize(const Row<T>& row, double smallest) {
  double* const matrix = row.m.matrix;
  for (int64_t c = 0; c < row.key_size; ++c) {
    double pivot = matrix[triangle(c, c)];
    for (int64_t e = 0; e < c; ++e) pivot -= matrix[triangle(c, e)] * matrix[triangle(c, e)];
    const double reciprocal = 1.0 / square_root(pivot > smallest ? pivot : smallest);
    for (int64_t r = c + 1 + threadIdx.x; r < row.key_size; r += kThreads) {
      double sum = matrix[triangle(r, c)];
      for (int64_t e = 0; e < c; ++e) sum -= matrix[triangle(r, e)] * matrix[triangle(c, e)];
      matrix[triangle(r, c)] = sum * reciprocal;
    }
    __syncthreads();
    if (threadIdx.x == 0) matrix[triangle(c, c)] = reciprocal;
    __syncthreads();
  }
}

// By one thread: a chain of K^2 steps.
template <class T>
TILEWRIGHT_DEVICE void substitute(const Row<T>& row, const T* right, T* x) {
  const int64_t size = row.key_size;
  const double* factor = row.m.matrix;
  double* unknown = row.m.matrix + size * (size + 1) / 2;
  for (int64_t c = 0; c < size; ++c) {
    double sum = static_cast<double>(right[c]);
    for (int64_t e = 0; e < c; ++e) sum -= factor[triangle(c, e)] * unknown[e];
    unknown[c] = sum * factor[triangle(c, c)];
  }
  for (int64_t c = size; c-- > 0;) {
    double sum = unknown[c];
    for (int64_t e = c + 1; e < size; ++e) sum -= factor[triangle(e, c)] * unknown[e];
    unknown[c] = sum * factor[triangle(c, c)];
    x[c] = static_cast<T>(unknown[c]);
  }
}

template <class T>
TILEWRIGHT_DEVICE void factor_and_solve(const Row<T>& row, const T* right, T* x) {
  const RowMemory<T>& m = row.m;
  const int64_t size = row.key_size;
  gather_moments(row);
  double largest = 0.0;
  for (int64_t d = 0; d < size; ++d) {
    const double value = m.matrix[triangle(d, d)];
    largest = value > largest ? value : largest;
  }
  __syncthreads();
  constexpr double kUnit = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;
  factorize(row, largest * kUnit);
  if (threadIdx.x == 0) substitute(row, right, x);
  __syncthreads();
  apply(row, x);
  for (int64_t d = threadIdx.x; d < size; d += kThreads) m.left[d] = right[d] - m.image[d];
  __syncthreads();
}

// x from right; when warm, x holds where to begin.
template <class T>
TILEWRIGHT_DEVICE Solved solve(const Row<T>& row, const T* right, T* x, bool warm) {
  Solved solved{0.0, 0};
  if (row.options.solver == Solver::kCholesky) {
    factor_and_solve(row, right, x);
  } else {
    solved.iterations = iterate(row, right, x, warm);
  }
  const T size = dot(row, right, right);
  if (size > T{0}) solved.residual = static_cast<double>(square_root(dot(row, row.m.left, row.m.left) / size));
  // What cannot be solved shows: without this the row would quietly be softmax attention.
  if (!finite(size) || row.lambda != row.lambda) {
    for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) x[d] = not_a_number<T>();
    solved.residual = not_a_number<double>();
  }
  __syncthreads();
  return solved;
}

}  // namespace tilewright::local_linear_attention::cuda
