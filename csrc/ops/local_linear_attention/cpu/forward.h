// SPDX-License-Identifier: Apache-2.0
// One block of the forward pass: weights, solve, output.
#pragma once

#include "ops/local_linear_attention/cpu/solve.h"

namespace tilewright::local_linear_attention {
namespace {

template <class T>
struct ForwardScratch {
  T *right, *x;        // [rows, key_row]: kbar - q, and the solution
  T* values;           // [64, value_row]
  T* out;              // [rows, value_row]
  T *shift, *total, *marks;  // [rows]: kbar.x; sum of the tilted weights; where values are not finite
};

template <class T>
void carve(ForwardScratch<T>& f, const Block<T>& b, Arena& arena) {
  for (T** rows : {&f.right, &f.x}) *rows = arena.take<T>(b.rows * b.key_row);
  f.values = arena.take<T>(kKeysPerTile * b.value_row);
  f.out = arena.take<T>(b.rows * b.value_row);
  for (T** numbers : {&f.shift, &f.total, &f.marks}) *numbers = arena.take<T>(b.rows);
}

// x [rows, key_row] from dense rows.
template <class T>
void load_rows(const Block<T>& b, const T* from, int64_t size, T* to, int64_t row) {
  for (int64_t r = 0; r < b.rows; ++r) load_row(from + b.row_at(r) * size, size, to + r * row, row);
}

// right = kbar - q; zero for a row without keys.
template <class T>
void right_side(const Block<T>& b, T* right) {
  for (int64_t r = 0; r < b.rows; ++r) {
    const T *mean = b.mean + r * b.key_row, *offset = b.offset + r * b.key_row;
    const bool none = b.omega[r] == T{0};
    for (int64_t d = 0; d < b.key_row; ++d) right[r * b.key_row + d] = none ? T{0} : mean[d] - offset[d];
  }
}

// tile [rows, 64] = p_j (1 - (k_j - kbar).x), and its sums added to total.
template <class T>
void tilt_weights(const Block<T>& b, const T* x, const T* shift, int64_t tile, T* to, T* total) {
  using S = Simd<T>;
  multiply<Before::kNothing>(rows_of(x, b.key_row), b.tile_keys_t(tile), kTileRow<T>, to, kTileRow<T>, b.rows,
                             kKeysPerTile, b.shape.key_size);
  for (int64_t r = 0; r < b.rows; ++r) {
    T* row = to + r * kTileRow<T>;
    const T* weight = b.tile_weights(tile) + r * kTileRow<T>;
    const typename S::V level = S::set1(T{1} + shift[r]), inverse = S::set1(b.inverse[r]);
    typename S::V sum = S::zero();
    for (int64_t c = 0; c < kKeysPerTile; c += S::kLanes) {
      const typename S::V p = S::mul(S::load(weight + c), inverse);
      const typename S::V tilted = S::mul(p, S::sub(level, S::load(row + c)));
      S::store(row + c, tilted);
      sum = S::add(sum, tilted);
    }
    total[r] += S::sum(sum);
  }
}

template <class T>
void write_out(const Forward<T>& p, const Block<T>& b, const Solve<T>& s, const ForwardScratch<T>& f) {
  const int64_t size = b.shape.key_size, value_size = b.shape.value_size;
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t at = b.row_at(r);
    const T* x = f.x + r * b.key_row;
    // The weights sum to 1 but for rounding; dividing makes what is left relative to the spread of the values. A sum far
    // from 1 belongs to a row that rounding has spoilt, or to one without keys.
    const T factor = f.total[r] > T{0.5} ? T{1} / f.total[r] : T{1};
    for (int64_t d = 0; d < value_size; ++d) {
      p.o[at * value_size + d] = f.out[r * b.value_row + d] * factor + f.marks[r];
    }
    if (b.options.solver == Solver::kGiven) continue;
    std::copy(x, x + size, p.x + at * size);
    T* record = p.rows + at * RowRecord::kSize;
    record[RowRecord::kPeak] = b.peak[r];
    record[RowRecord::kOmega] = b.omega[r];
    record[RowRecord::kLeverage] = dot(f.right + r * b.key_row, x, b.width);
    record[RowRecord::kResidual] = s.residual[r];
    p.iterations[at] = s.counts[r];
  }
}

template <class T>
void forward_block(const Forward<T>& p, const BlockItem& item) {
  Block<T> b(p.shape, p.options, item);
  Solve<T> s{};
  ForwardScratch<T> f{};
  const auto carve_all = [&](Arena& arena) {
    carve(b, arena);
    carve(s, b, arena);
    carve(f, b, arena);
  };
  Arena count{nullptr, 0};
  carve_all(count);
  Arena arena{static_cast<char*>(thread_memory(count.used)), 0};
  carve_all(arena);

  prepare(b, p.q, p.k);
  right_side(b, f.right);
  const bool given = p.options.solver == Solver::kGiven;
  if (p.start != nullptr) load_rows(b, p.start, p.shape.key_size, f.x, b.key_row);
  if (!given) {
    ridges(b, p.ridge, s.lambda, s.factor);
    solve(b, s, f.right, f.x, p.start != nullptr);
  }
  for (int64_t r = 0; r < b.rows; ++r) f.shift[r] = dot(b.mean + r * b.key_row, f.x + r * b.key_row, b.width);
  std::fill(f.out, f.out + b.rows * b.value_row, T{0});
  std::fill(f.marks, f.marks + b.rows, T{0});
  std::fill(f.total, f.total + b.rows, T{0});
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    load_values(b, p.v, tile, f.values, f.marks);
    tilt_weights(b, f.x, f.shift, tile, s.tile, f.total);
    multiply<Before::kKeep>(rows_of(s.tile, kTileRow<T>), f.values, b.value_row, f.out, b.value_row, b.rows,
                            b.value_width, kKeysPerTile);
  }
  write_out(p, b, s, f);
}

}  // namespace
}  // namespace tilewright::local_linear_attention
