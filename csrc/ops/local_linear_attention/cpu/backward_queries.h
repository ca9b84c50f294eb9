// SPDX-License-Identifier: Apache-2.0
// One block of the backward pass over queries. With gamma_j = do.v_j, g = sum_j p_j gamma_j and
// a_j = 1 - (k_j - kbar).x:
//
//   t = sum_j p_j (gamma_j - g) (k_j - kbar)        (Cov + lambda I) u = t
//   e_j = gamma_j - g - (k_j - kbar).u              dscore_j = p_j (e_j a_j - sum_l p_l e_l a_l)
//   dq = scale sum_j dscore_j k_j + u               dlambda = u.x
//
// With an exact solution the subtracted sum is -lambda u.x. An absolute ridge, and the published gradient, see lambda
// over a sum of weights: that adds -lambda u.x p_j to each dscore_j. Parallax has u = 0 and dx = -t.
#pragma once

#include "ops/local_linear_attention/cpu/forward.h"

namespace tilewright::local_linear_attention {
namespace {

template <class T>
struct BackwardScratch {
  T *x, *u, *right, *dq;               // [rows, key_row]
  T* grad;                             // [rows, value_row]
  T *values, *values_t;                // [64, value_row], [V, kTileRow]
  T* gammas;                           // [tiles][rows, kTileRow]: gamma, then e a
  T *projected, *projected_u;          // [rows, kTileRow]
  T *value, *mean, *extra, *key_x, *key_u, *marks;   // [rows]
};

template <class T>
void carve(BackwardScratch<T>& f, const Block<T>& b, Arena& arena) {
  for (T** rows : {&f.x, &f.u, &f.right, &f.dq}) *rows = arena.take<T>(b.rows * b.key_row);
  f.grad = arena.take<T>(b.rows * b.value_row);
  f.values = arena.take<T>(kKeysPerTile * b.value_row);
  f.values_t = arena.take<T>(b.shape.value_size * kTileRow<T>);
  f.gammas = arena.take<T>(b.tiles * b.rows * kTileRow<T>);
  for (T** tiles : {&f.projected, &f.projected_u}) *tiles = arena.take<T>(b.rows * kTileRow<T>);
  for (T** numbers : {&f.value, &f.mean, &f.extra, &f.key_x, &f.key_u, &f.marks}) *numbers = arena.take<T>(b.rows);
}

// sum_j of a product over a row of a tile.
template <class T>
T weighted_sum(const T* weight, const T* row) {
  return dot(weight, row, kKeysPerTile);
}

template <class T>
void project_values(Block<T>& b, const T* v, BackwardScratch<T>& f) {
  std::fill(f.value, f.value + b.rows, T{0});
  std::fill(f.marks, f.marks + b.rows, T{0});
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    load_values(b, v, tile, f.values, f.marks);
    transpose(f.values, b.value_row, f.values_t, kTileRow<T>, kKeysPerTile, b.shape.value_size);
    T* gammas = f.gammas + tile * b.rows * kTileRow<T>;
    multiply<Before::kNothing>(rows_of(f.grad, b.value_row), f.values_t, kTileRow<T>, gammas, kTileRow<T>, b.rows,
                               kKeysPerTile, b.shape.value_size);
    for (int64_t r = 0; r < b.rows; ++r) {
      f.value[r] += weighted_sum(b.tile_weights(tile) + r * kTileRow<T>, gammas + r * kTileRow<T>);
    }
  }
  for (int64_t r = 0; r < b.rows; ++r) f.value[r] = f.value[r] * b.inverse[r] + f.marks[r];
}

// to [rows, key_row] = sum_j p_j (field_j - level) k_j over all tiles, fields [tiles][rows, kTileRow]; the sums of the
// factors go to drift.
template <class T>
void weighted_keys(const Block<T>& b, const T* fields, const T* level, T* buffer, T* drift, T* to) {
  using S = Simd<T>;
  std::fill(to, to + b.rows * b.key_row, T{0});
  std::fill(drift, drift + b.rows, T{0});
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    const int64_t base = tile * b.rows * kTileRow<T>;
    for (int64_t r = 0; r < b.rows; ++r) {
      const T *weight = b.weights + base + r * kTileRow<T>, *field = fields + base + r * kTileRow<T>;
      T* row = buffer + r * kTileRow<T>;
      const typename S::V off = S::set1(level[r]), inverse = S::set1(b.inverse[r]);
      typename S::V sum = S::zero();
      for (int64_t c = 0; c < kKeysPerTile; c += S::kLanes) {
        const typename S::V p = S::mul(S::load(weight + c), inverse);
        const typename S::V product = S::mul(p, S::sub(S::load(field + c), off));
        S::store(row + c, product);
        sum = S::add(sum, product);
      }
      drift[r] += S::sum(sum);
    }
    multiply<Before::kKeep>(rows_of(buffer, kTileRow<T>), b.tile_keys(tile), b.key_row, to, b.key_row, b.rows, b.width,
                            kKeysPerTile);
  }
}

// gammas become e_j a_j, and mean their weighted sums.
template <class T>
void multiply_factors(const Block<T>& b, bool given, BackwardScratch<T>& f) {
  using S = Simd<T>;
  std::fill(f.mean, f.mean + b.rows, T{0});
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    multiply<Before::kNothing>(rows_of(f.x, b.key_row), b.tile_keys_t(tile), kTileRow<T>, f.projected, kTileRow<T>,
                               b.rows, kKeysPerTile, b.shape.key_size);
    if (!given) {
      multiply<Before::kNothing>(rows_of(f.u, b.key_row), b.tile_keys_t(tile), kTileRow<T>, f.projected_u, kTileRow<T>,
                                 b.rows, kKeysPerTile, b.shape.key_size);
    }
    for (int64_t r = 0; r < b.rows; ++r) {
      T* field = f.gammas + (tile * b.rows + r) * kTileRow<T>;
      const T *along = f.projected + r * kTileRow<T>, *along_u = f.projected_u + r * kTileRow<T>;
      const typename S::V level = S::set1(T{1} + f.key_x[r]), off = S::set1(f.value[r] - f.key_u[r]);
      for (int64_t c = 0; c < kKeysPerTile; c += S::kLanes) {
        typename S::V e = S::sub(S::load(field + c), off);
        if (!given) e = S::sub(e, S::load(along_u + c));
        S::store(field + c, S::mul(e, S::sub(level, S::load(along + c))));
      }
      f.mean[r] += weighted_sum(b.tile_weights(tile) + r * kTileRow<T>, field);
    }
  }
  for (int64_t r = 0; r < b.rows; ++r) f.mean[r] *= b.inverse[r];
}

template <class T>
void write_gradients(const Backward<T>& p, const Block<T>& b, const Solve<T>& s, const BackwardScratch<T>& f) {
  const bool given = p.options.solver == Solver::kGiven;
  const int64_t size = b.shape.key_size;
  const T scale = static_cast<T>(p.options.scale);
  if (b.rows > 0) std::copy(b.centre, b.centre + size, p.centres + b.item.block * size);
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t at = b.row_at(r), row = r * b.key_row;
    for (int64_t d = 0; d < size; ++d) {
      const T sum = scale * (f.dq[row + d] - f.extra[r] * b.centre[d]);
      p.dq[at * size + d] = given ? sum : sum + f.u[row + d];
      if (given) p.dx[at * size + d] = -f.right[row + d];
      if (!given) p.u[at * size + d] = f.u[row + d];
    }
    if (!given) p.dridge[at] = dot(f.u + row, f.x + row, b.width) * s.factor[r];
    T* record = p.records + at * GradRecord::kSize;
    record[GradRecord::kKeyX] = f.key_x[r];
    record[GradRecord::kKeyU] = f.key_u[r];
    record[GradRecord::kValue] = f.value[r];
    record[GradRecord::kMean] = f.mean[r];
    record[GradRecord::kPeak] = b.peak[r];
    record[GradRecord::kOmega] = b.omega[r];
  }
}

template <class T>
void backward_block(const Backward<T>& p, const BlockItem& item) {
  Block<T> b(p.shape, p.options, item);
  Solve<T> s{};
  BackwardScratch<T> f{};
  const auto carve_all = [&](Arena& arena) {
    carve(b, arena);
    carve(s, b, arena);
    carve(f, b, arena);
  };
  Arena count{nullptr, 0};
  carve_all(count);
  Arena arena{static_cast<char*>(thread_memory(count.used)), 0};
  carve_all(arena);

  const bool given = p.options.solver == Solver::kGiven;
  prepare(b, p.q, p.k);
  load_rows(b, p.x, p.shape.key_size, f.x, b.key_row);
  load_rows(b, p.grad, p.shape.value_size, f.grad, b.value_row);
  project_values(b, p.v, f);
  weighted_keys(b, f.gammas, f.value, s.tile, s.drift, f.right);
  for (int64_t r = 0; r < b.rows; ++r) {
    add_scaled(-s.drift[r], b.mean + r * b.key_row, f.right + r * b.key_row, b.width);
  }
  if (!given) {
    ridges(b, p.ridge, s.lambda, s.factor);
    solve(b, s, f.right, f.u, false);
  }
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t row = r * b.key_row;
    f.key_x[r] = dot(b.mean + row, f.x + row, b.width);
    f.key_u[r] = given ? T{0} : dot(b.mean + row, f.u + row, b.width);
  }
  multiply_factors(b, given, f);
  for (int64_t r = 0; r < b.rows; ++r) {
    const bool weighs = !given && (p.options.absolute || !p.options.ridge_grad);
    f.extra[r] = weighs ? s.lambda[r] * dot(f.u + r * b.key_row, f.x + r * b.key_row, b.width) : T{0};
    f.mean[r] += f.extra[r];
  }
  weighted_keys(b, f.gammas, f.mean, s.tile, s.drift, f.dq);
  write_gradients(p, b, s, f);
}

}  // namespace
}  // namespace tilewright::local_linear_attention
