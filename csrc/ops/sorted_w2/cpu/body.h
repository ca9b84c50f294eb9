// SPDX-License-Identifier: Apache-2.0
// Compiled once a level. Sixteen columns side by side; ranks by counting, so that no lane branches.
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "ops/sorted_w2/kernels.h"

namespace tilewright::sorted_w2::TILEWRIGHT_LEVEL {
namespace {

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

template <class T>
using IntOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
struct Row {
  using Values __attribute__((vector_size(kColumns * sizeof(T)))) = T;
  using Ints __attribute__((vector_size(kColumns * sizeof(T)))) = IntOf<T>;
};

template <class T>
struct Tile {
  alignas(64) T values[kMaxSamples][kColumns];
  alignas(64) IntOf<T> ranks[kMaxSamples][kColumns];
};

template <class T>
void load(const T* from, int64_t stride, int64_t rows, int64_t width, Tile<T>& tile) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < width; ++c) tile.values[i][c] = from[i * stride + c];
    for (int64_t c = width; c < kColumns; ++c) tile.values[i][c] = T(0);
  }
}

// ranks[i] = how many rows stand before row i when the column is sorted; equal values keep their order. Each pair of rows
// is compared once. With NaN in a column ranks may collide, but stay below `rows`.
template <class T>
void rank(int64_t rows, Tile<T>& tile) {
  using Values = typename Row<T>::Values;
  using Ints = typename Row<T>::Ints;
  for (int64_t i = 0; i < rows; ++i) std::fill(tile.ranks[i], tile.ranks[i] + kColumns, IntOf<T>(0));
  for (int64_t i = 0; i < rows; ++i) {
    Values mine;
    Ints before;
    std::memcpy(&mine, tile.values[i], sizeof(mine));
    std::memcpy(&before, tile.ranks[i], sizeof(before));
    for (int64_t k = i + 1; k < rows; ++k) {
      Values other;
      Ints theirs;
      std::memcpy(&other, tile.values[k], sizeof(other));
      std::memcpy(&theirs, tile.ranks[k], sizeof(theirs));
      const Ints smaller = other < mine;  // -1 where row k stands before row i
      before -= smaller;
      theirs += smaller + 1;
      std::memcpy(tile.ranks[k], &theirs, sizeof(theirs));
    }
    std::memcpy(tile.ranks[i], &before, sizeof(before));
  }
}

template <class T>
void sort(int64_t rows, const Tile<T>& tile, T (*sorted)[kColumns]) {
  // A column that holds NaN leaves a place without a value: that must be NaN as well.
  for (int64_t i = 0; i < rows; ++i) {
    std::fill(sorted[i], sorted[i] + kColumns, std::numeric_limits<T>::quiet_NaN());
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < kColumns; ++c) sorted[tile.ranks[i][c]][c] = tile.values[i][c];
  }
}

template <class T>
void block(const Problem<T>& p, int64_t column, int64_t width) {
  Tile<T> z;
  alignas(64) T sorted[kMaxSamples][kColumns];
  {
    Tile<T> v;
    load(p.v + column, p.v_stride, p.m, width, v);
    rank(p.m, v);
    sort(p.m, v, sorted);
  }
  load(p.z + column, p.z_stride, p.n, width, z);
  rank(p.n, z);
  alignas(64) T cost[kColumns] = {};
  for (int64_t i = 0; i < p.n; ++i) {
    T* gradient = p.gradient + i * p.columns + column;
    for (int64_t c = 0; c < width; ++c) {
      const IntOf<T> r = z.ranks[i][c];
      T slope = T(0);
      for (int64_t at = p.first[r]; at < p.first[r + 1]; ++at) {
        const T share = static_cast<T>(p.pairs[at].share);
        const T apart = z.values[i][c] - sorted[p.pairs[at].row][c];
        cost[c] += share * (apart * apart);
        slope += T(2) * share * apart;
      }
      gradient[c] = slope;
    }
  }
  std::copy(cost, cost + width, p.cost + column);
}

template <class T>
void run_blocks(const Problem<T>& p, int64_t from, int64_t to) {
  for (int64_t b = from; b < to; ++b) block(p, b * kColumns, std::min(kColumns, p.columns - b * kColumns));
}

}  // namespace

void run(const Problem<float>& p, int64_t from, int64_t to) { run_blocks(p, from, to); }
void run(const Problem<double>& p, int64_t from, int64_t to) { run_blocks(p, from, to); }

}  // namespace tilewright::sorted_w2::TILEWRIGHT_LEVEL
