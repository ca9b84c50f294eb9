// SPDX-License-Identifier: Apache-2.0
// (Cov_r + lambda_r I) x_r = right_r for the rows r of a block, Cov_r the covariance of the keys under the row's weights.
#pragma once

#include "ops/local_linear_attention/cpu/block.h"

namespace tilewright::local_linear_attention {
namespace {

template <class T>
struct Solve {
  T* lambda;  // [rows]
  T* factor;  // [rows], d lambda / d ridge
  T* residual;  // [rows], result: |residual| / |right|
  int32_t* counts;  // [rows], result: iterations

  // Conjugate gradients. Rows of the pass lie one after another, so that finished rows cost nothing.
  T *left, *direction, *scaled, *diagonal;  // [rows, key_row]
  T *packed, *image;  // [rows, key_row], the directions of active rows, and the matrix times them
  T* tile;  // [rows, kTileRow]
  T *square, *limit, *shift, *drift;  // [rows]
  int64_t* active;  // [rows]

  // Cholesky.
  int64_t moment_row;  // padded row of K (K + 1) / 2 elements
  T* products;  // [64, moment_row], k_a k_b of the tile's keys
  T* moments;  // [rows, moment_row]
  double *matrix, *factors;  // [K (K + 1) / 2, lanes]
  double *unknown, *rest;  // [K, lanes]
};

template <class T>
void carve(Solve<T>& s, const Block<T>& b, Arena& arena) {
  for (T** numbers : {&s.lambda, &s.factor, &s.residual, &s.square, &s.limit, &s.shift, &s.drift}) {
    *numbers = arena.take<T>(b.rows);
  }
  s.counts = arena.take<int32_t>(b.rows);
  s.active = arena.take<int64_t>(b.rows);
  s.tile = arena.take<T>(b.rows * kTileRow<T>);
  for (T** rows : {&s.left, &s.direction, &s.scaled, &s.diagonal, &s.packed, &s.image}) {
    *rows = arena.take<T>(b.rows * b.key_row);
  }
  if (b.options.solver != Solver::kCholesky) return;
  const int64_t size = b.shape.key_size;
  s.moment_row = leading<T>(size * (size + 1) / 2);
  s.products = arena.take<T>(kKeysPerTile * s.moment_row);
  s.moments = arena.take<T>(b.rows * s.moment_row);
  for (double** triangle : {&s.matrix, &s.factors}) {
    *triangle = arena.take<double>(size * (size + 1) / 2 * Simd<double>::kLanes);
  }
  for (double** vectors : {&s.unknown, &s.rest}) *vectors = arena.take<double>(size * Simd<double>::kLanes);
}

// image = (Cov + lambda I) packed for the active rows: sum_j p_j (k_j - kbar).p k_j, corrected for what rounding leaves of
// sum_j p_j (k_j - kbar).p = 0.
template <class T>
void apply(const Block<T>& b, Solve<T>& s, int64_t count) {
  using S = Simd<T>;
  for (int64_t a = 0; a < count; ++a) {
    s.shift[a] = dot(b.mean + s.active[a] * b.key_row, s.packed + a * b.key_row, b.width);
    s.drift[a] = T{0};
  }
  std::fill(s.image, s.image + count * b.key_row, T{0});
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    multiply<Before::kNothing>(rows_of(s.packed, b.key_row), b.tile_keys_t(tile), kTileRow<T>, s.tile, kTileRow<T>,
                               count, kKeysPerTile, b.shape.key_size);
    for (int64_t a = 0; a < count; ++a) {
      T* row = s.tile + a * kTileRow<T>;
      const T* weight = b.tile_weights(tile) + s.active[a] * kTileRow<T>;
      const typename S::V shift = S::set1(s.shift[a]);
      typename S::V sum = S::zero();
      for (int64_t c = 0; c < kKeysPerTile; c += S::kLanes) {
        const typename S::V product = S::mul(S::load(weight + c), S::sub(S::load(row + c), shift));
        S::store(row + c, product);
        sum = S::add(sum, product);
      }
      s.drift[a] += S::sum(sum);
    }
    multiply<Before::kKeep>(rows_of(s.tile, kTileRow<T>), b.tile_keys(tile), b.key_row, s.image, b.key_row, count,
                            b.width, kKeysPerTile);
  }
  for (int64_t a = 0; a < count; ++a) {
    const int64_t r = s.active[a];
    T* row = s.image + a * b.key_row;
    add_scaled(-s.drift[a], b.mean + r * b.key_row, row, b.width);
    for (int64_t d = 0; d < b.width; ++d) row[d] *= b.inverse[r];
    add_scaled(s.lambda[r], s.packed + a * b.key_row, row, b.width);
  }
}

// The diagonal of Cov + lambda I, inverted; 1 without preconditioner.
template <class T>
void precondition(const Block<T>& b, Solve<T>& s) {
  const int64_t all = b.rows * b.key_row;
  std::fill(s.diagonal, s.diagonal + all, b.options.jacobi ? T{0} : T{1});
  if (!b.options.jacobi) return;
  // The squares of a tile's keys borrow the rows of the directions, rows at a time.
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    for (int64_t c = 0; c < kKeysPerTile; c += b.rows) {
      const int64_t keys = std::min(b.rows, kKeysPerTile - c);
      const T* from = b.tile_keys(tile) + c * b.key_row;
      for (int64_t i = 0; i < keys * b.key_row; ++i) s.packed[i] = from[i] * from[i];
      multiply<Before::kKeep>(rows_of(b.tile_weights(tile) + c, kTileRow<T>), s.packed, b.key_row, s.diagonal,
                              b.key_row, b.rows, b.width, keys);
    }
  }
  for (int64_t r = 0; r < b.rows; ++r) {
    for (int64_t d = 0; d < b.width; ++d) {
      T& at = s.diagonal[r * b.key_row + d];
      const T mean = b.mean[r * b.key_row + d];
      at = T{1} / (std::max(at * b.inverse[r] - mean * mean, T{0}) + s.lambda[r]);
    }
  }
}

// packed = the directions of the active rows.
template <class T>
void pack(const Block<T>& b, Solve<T>& s, const T* from, int64_t count) {
  for (int64_t a = 0; a < count; ++a) {
    const T* row = from + s.active[a] * b.key_row;
    std::copy(row, row + b.key_row, s.packed + a * b.key_row);
  }
}

// x is where to begin (warm) and the result. Beginning takes the best multiple of x: the step along x that an iteration
// would take, from zero.
template <class T>
void begin_iterations(const Block<T>& b, Solve<T>& s, const T* right, T* x, bool warm) {
  const int64_t all = b.rows * b.key_row;
  std::copy(right, right + all, s.left);
  if (!warm) {
    std::fill(x, x + all, T{0});
    return;
  }
  for (int64_t r = 0; r < b.rows; ++r) s.active[r] = r;
  pack(b, s, x, b.rows);
  apply(b, s, b.rows);
  for (int64_t r = 0; r < b.rows; ++r) {
    T* row = x + r * b.key_row;
    const T* image = s.image + r * b.key_row;
    const T step = dot(row, right + r * b.key_row, b.width) / dot(row, image, b.width);
    if (!std::isfinite(step)) {
      std::fill(row, row + b.key_row, T{0});
      continue;
    }
    for (int64_t d = 0; d < b.width; ++d) row[d] *= step;
    add_scaled(-step, image, s.left + r * b.key_row, b.width);
  }
}

template <class T>
void iterate(const Block<T>& b, Solve<T>& s, const T* right, T* x, bool warm) {
  const T rtol = static_cast<T>(b.options.rtol);
  begin_iterations(b, s, right, x, warm);
  precondition(b, s);
  int64_t count = 0;
  for (int64_t r = 0; r < b.rows; ++r) {
    const T *left = s.left + r * b.key_row, *diagonal = s.diagonal + r * b.key_row;
    T* direction = s.direction + r * b.key_row;
    for (int64_t d = 0; d < b.key_row; ++d) direction[d] = left[d] * diagonal[d];
    s.square[r] = dot(left, direction, b.width);
    s.limit[r] = rtol * rtol * dot(right + r * b.key_row, right + r * b.key_row, b.width);
    s.counts[r] = 0;
    if (dot(left, left, b.width) > s.limit[r]) s.active[count++] = r;
  }
  for (int64_t i = 0; i < b.options.max_iterations && count > 0; ++i) {
    pack(b, s, s.direction, count);
    apply(b, s, count);
    int64_t kept = 0;
    for (int64_t a = 0; a < count; ++a) {
      const int64_t r = s.active[a];
      T *left = s.left + r * b.key_row, *direction = s.direction + r * b.key_row;
      const T *image = s.image + a * b.key_row, *diagonal = s.diagonal + r * b.key_row;
      const T curvature = dot(direction, image, b.width);
      if (!(curvature > T{0})) continue;  // rounding or NaN: nothing to be gained along this direction
      const T step = s.square[r] / curvature;
      add_scaled(step, direction, x + r * b.key_row, b.width);
      add_scaled(-step, image, left, b.width);
      ++s.counts[r];
      if (!(dot(left, left, b.width) > s.limit[r])) continue;
      T* scaled = s.scaled + r * b.key_row;
      for (int64_t d = 0; d < b.width; ++d) scaled[d] = left[d] * diagonal[d];
      const T square = dot(left, scaled, b.width), ratio = square / s.square[r];
      for (int64_t d = 0; d < b.width; ++d) direction[d] = scaled[d] + ratio * direction[d];
      s.square[r] = square;
      s.active[kept++] = r;
    }
    count = kept;
  }
}

// moments [rows, K (K + 1) / 2] = sum_j p_j k_a k_b for a >= b: one product of weights and products of keys.
template <class T>
void gather_moments(const Block<T>& b, Solve<T>& s) {
  const int64_t size = b.shape.key_size;
  std::fill(s.moments, s.moments + b.rows * s.moment_row, T{0});
  std::fill(s.products, s.products + kKeysPerTile * s.moment_row, T{0});
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    for (int64_t c = 0; c < kKeysPerTile; ++c) {
      const T* key = b.tile_keys(tile) + c * b.key_row;
      T* to = s.products + c * s.moment_row;
      for (int64_t row = 0; row < size; ++row) {
        for (int64_t column = 0; column <= row; ++column) *to++ = key[row] * key[column];
      }
    }
    multiply<Before::kKeep>(rows_of(b.tile_weights(tile), kTileRow<T>), s.products, s.moment_row, s.moments,
                            s.moment_row, b.rows, padded<T>(size * (size + 1) / 2), kKeysPerTile);
  }
}

// Rows of a block side by side, one a lane, in double: element (row, column) of a triangle lies at
// (row (row + 1) / 2 + column) * lanes.
using Lane = Simd<double>;

inline double* element(double* triangle, int64_t row, int64_t column) {
  return triangle + (row * (row + 1) / 2 + column) * Lane::kLanes;
}

// The Cholesky factor in place. A pivot that rounding has made smaller than what rounding can make is raised to that.
inline void factorize(double* matrix, int64_t n, Lane::V smallest) {
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t d = 0; d <= c; ++d) {
      const double *left = element(matrix, c, 0), *right = element(matrix, d, 0);
      Lane::V sum = Lane::zero();
      for (int64_t e = 0; e < d; ++e) {
        sum = Lane::fma(Lane::load(left + e * Lane::kLanes), Lane::load(right + e * Lane::kLanes), sum);
      }
      double* at = element(matrix, c, d);
      sum = Lane::sub(Lane::load(at), sum);
      if (d < c) {
        Lane::store(at, Lane::mul(sum, Lane::load(element(matrix, d, d))));
        continue;
      }
      // The reciprocal of the diagonal is what everything after needs.
      Lane::store(at, Lane::select_less(sum, smallest, smallest, sum));
      for (int l = 0; l < Lane::kLanes; ++l) at[l] = 1.0 / std::sqrt(at[l]);
    }
  }
}

inline void substitute(double* factor, int64_t n, double* x) {
  for (int64_t c = 0; c < n; ++c) {
    Lane::V sum = Lane::zero();
    for (int64_t d = 0; d < c; ++d) {
      sum = Lane::fma(Lane::load(element(factor, c, d)), Lane::load(x + d * Lane::kLanes), sum);
    }
    double* at = x + c * Lane::kLanes;
    Lane::store(at, Lane::mul(Lane::sub(Lane::load(at), sum), Lane::load(element(factor, c, c))));
  }
  for (int64_t c = n; c-- > 0;) {
    double* at = x + c * Lane::kLanes;
    const Lane::V value = Lane::mul(Lane::load(at), Lane::load(element(factor, c, c)));
    Lane::store(at, value);
    for (int64_t d = 0; d < c; ++d) {
      double* to = x + d * Lane::kLanes;
      Lane::store(to, Lane::sub(Lane::load(to), Lane::mul(Lane::load(element(factor, c, d)), value)));
    }
  }
}

// left = left - matrix x
inline void subtract_product(double* matrix, int64_t n, const double* x, double* left) {
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t d = 0; d < n; ++d) {
      const Lane::V a = Lane::load(element(matrix, std::max(c, d), std::min(c, d)));
      double* to = left + c * Lane::kLanes;
      Lane::store(to, Lane::sub(Lane::load(to), Lane::mul(a, Lane::load(x + d * Lane::kLanes))));
    }
  }
}

// Cov + lambda I of the row in a lane, from moments in T. Returns the largest element of the diagonal.
template <class T>
double load_matrix(const Block<T>& b, const Solve<T>& s, int64_t r, int64_t lane) {
  const T *mean = b.mean + r * b.key_row, *moment = s.moments + r * s.moment_row;
  const double inverse = b.inverse[r], lambda = s.lambda[r];
  double* to = s.matrix + lane;
  double largest = 0.0;
  for (int64_t row = 0; row < b.shape.key_size; ++row) {
    for (int64_t column = 0; column <= row; ++column, to += Lane::kLanes) {
      *to = static_cast<double>(*moment++) * inverse - static_cast<double>(mean[row]) * mean[column];
    }
    double& diagonal = *(to - Lane::kLanes);
    diagonal = std::max(diagonal, 0.0) + lambda;
    largest = std::max(largest, diagonal);
  }
  return largest;
}

// The systems in double; their residual counts what the solutions lost when they were rounded to T.
template <class T>
void factor_and_solve(const Block<T>& b, Solve<T>& s, const T* right, T* x) {
  const int64_t n = b.shape.key_size, elements = n * (n + 1) / 2 * Lane::kLanes;
  gather_moments(b, s);
  std::fill(s.left, s.left + b.rows * b.key_row, T{0});
  std::fill(x, x + b.rows * b.key_row, T{0});
  for (int64_t first = 0; first < b.rows; first += Lane::kLanes) {
    const int64_t count = std::min<int64_t>(Lane::kLanes, b.rows - first);
    double smallest[Lane::kLanes];
    for (int64_t l = 0; l < Lane::kLanes; ++l) {
      const int64_t r = first + std::min(l, count - 1);  // lanes to spare repeat the last row
      smallest[l] = load_matrix(b, s, r, l) * std::numeric_limits<T>::epsilon() * 0.5;
      for (int64_t d = 0; d < n; ++d) s.unknown[d * Lane::kLanes + l] = right[r * b.key_row + d];
    }
    std::copy(s.matrix, s.matrix + elements, s.factors);
    std::copy(s.unknown, s.unknown + n * Lane::kLanes, s.rest);
    factorize(s.factors, n, Lane::load(smallest));
    substitute(s.factors, n, s.unknown);
    for (int64_t l = 0; l < count; ++l) {
      for (int64_t d = 0; d < n; ++d) {
        double& value = s.unknown[d * Lane::kLanes + l];
        const T rounded = static_cast<T>(value);
        x[(first + l) * b.key_row + d] = rounded;
        value = rounded;
      }
      s.counts[first + l] = 0;
    }
    subtract_product(s.matrix, n, s.unknown, s.rest);
    for (int64_t l = 0; l < count; ++l) {
      for (int64_t d = 0; d < n; ++d) {
        s.left[(first + l) * b.key_row + d] = static_cast<T>(s.rest[d * Lane::kLanes + l]);
      }
    }
  }
}

// x [rows, key_row] from right [rows, key_row]; when warm, x holds where to begin.
template <class T>
void solve(const Block<T>& b, Solve<T>& s, const T* right, T* x, bool warm) {
  if (b.options.solver == Solver::kCholesky) {
    factor_and_solve(b, s, right, x);
  } else {
    iterate(b, s, right, x, warm);
  }
  for (int64_t r = 0; r < b.rows; ++r) {
    const T *left = s.left + r * b.key_row, *from = right + r * b.key_row;
    const T size = dot(from, from, b.width);
    s.residual[r] = size > T{0} ? std::sqrt(dot(left, left, b.width) / size) : T{0};
    // What cannot be solved shows: without this the row would quietly be softmax attention.
    if (!std::isfinite(size) || std::isnan(s.lambda[r])) {
      std::fill(x + r * b.key_row, x + r * b.key_row + b.width, std::numeric_limits<T>::quiet_NaN());
      s.residual[r] = std::numeric_limits<T>::quiet_NaN();
    }
  }
}

}  // namespace
}  // namespace tilewright::local_linear_attention
