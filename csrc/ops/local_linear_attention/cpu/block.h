// SPDX-License-Identifier: Apache-2.0
// A block of rows (queries times the query heads of one key head) against all keys that they see: the keys, taken from
// a centre and in both orders, and the weights exp(score - peak) of every pair. Both stay in scratch memory, which grows
// with the number of keys: a pass of the solver then costs two products and no exponential.
//
// NaN: keys that some rows of the block see and others do not must not meet the weight 0 of the latter. Where such a key
// is not finite it counts as zero, and the rows that see it are marked instead.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/common/tile_products.h"
#include "ops/local_linear_attention/kernels.h"

namespace tilewright::local_linear_attention {
namespace {

// Hands out pieces of one allocation; with base null it only counts.
struct Arena {
  char* base;
  int64_t used;

  template <class T>
  T* take(int64_t count) {
    const int64_t at = used;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), kCacheLine);
    return base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
  }
};

template <class T>
constexpr int64_t kTileRow = leading<T>(kKeysPerTile);

template <class T>
T dot(const T* a, const T* b, int64_t width) {
  using S = Simd<T>;
  typename S::V sum = S::zero();
  for (int64_t d = 0; d < width; d += S::kLanes) sum = S::fma(S::load(a + d), S::load(b + d), sum);
  return S::sum(sum);
}

// y = factor * x + y
template <class T>
void add_scaled(T factor, const T* x, T* y, int64_t width) {
  using S = Simd<T>;
  const typename S::V f = S::set1(factor);
  for (int64_t d = 0; d < width; d += S::kLanes) S::store(y + d, S::fma(f, S::load(x + d), S::load(y + d)));
}

template <class T>
bool all_finite(const T* x, int64_t n) {
  T sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += x[d] * T{0};
  return sum == T{0};
}

// n elements, then zeros up to the end of the padded row.
template <class T>
void load_row(const T* from, int64_t n, T* to, int64_t row) {
  std::copy(from, from + n, to);
  std::fill(to + n, to + row, T{0});
}

struct Visible {
  int64_t begin, end;
};

inline Visible visible_keys(const Options& o, const Segment& s, int64_t query) {
  const int64_t position = s.keys - s.queries + query;
  const int64_t begin = o.window > position ? 0 : position - o.window + 1;
  return {begin, o.causal ? std::min(position + 1, s.keys) : s.keys};
}

template <class T>
struct Block {
  Block(const Shape& its_shape, const Options& its_options, const BlockItem& its_item);

  const Shape& shape;
  const Options& options;
  BlockItem item;
  int64_t rows;  // r = query * group + head
  int64_t key_row, value_row;  // padded rows of K and of V elements
  int64_t width, value_width;  // K and V in whole vectors
  int64_t begin, end;  // keys of the segment that some row sees
  int64_t common_begin, common_end;  // that every row sees; empty when begin >= end
  int64_t origin;  // key of the first tile's first column
  int64_t tiles;

  T* centre;  // [key_row], the mean of the common keys: the error of a difference is relative to the keys' spread
  T* keys;  // [tiles * 64, key_row], less the centre
  T* keys_t;  // [tiles][K, kTileRow]
  T* weights;  // [tiles][rows, kTileRow]
  T* scaled;  // [rows, key_row], scale * q
  T* offset;  // [rows, key_row], q less the centre
  T* mean;  // [rows, key_row], kbar less the centre
  T* peak;  // [rows]
  T* omega;  // [rows]
  T* inverse;  // [rows], 1 / omega, 0 for a row without keys
  T* marks;  // [rows], NaN where a row sees a key that is not finite, else 0

  int64_t key_at(int64_t key) const { return (item.segment.first_key + key) * shape.kv_heads + item.kv_head; }
  int64_t row_at(int64_t r) const {
    const int64_t group = shape.group();
    return (item.segment.first_query + item.first + r / group) * shape.heads + item.kv_head * group + r % group;
  }
  Visible seen(int64_t r) const { return visible_keys(options, item.segment, item.first + r / shape.group()); }
  T* tile_keys(int64_t tile) const { return keys + tile * kKeysPerTile * key_row; }
  T* tile_keys_t(int64_t tile) const { return keys_t + tile * shape.key_size * kTileRow<T>; }
  T* tile_weights(int64_t tile) const { return weights + tile * rows * kTileRow<T>; }
  // All rows see all columns of the tile.
  bool whole(int64_t tile) const {
    const int64_t first = origin + tile * kKeysPerTile;
    return common_begin <= first && first + kKeysPerTile <= common_end;
  }
};

template <class T>
Block<T>::Block(const Shape& its_shape, const Options& its_options, const BlockItem& its_item)
    : shape(its_shape), options(its_options), item(its_item) {
  rows = item.queries * shape.group();
  key_row = leading<T>(shape.key_size);
  value_row = leading<T>(shape.value_size);
  width = padded<T>(shape.key_size);
  value_width = padded<T>(shape.value_size);
  const Visible first = visible_keys(options, item.segment, item.first);
  const Visible last = visible_keys(options, item.segment, item.first + item.queries - 1);
  begin = first.begin;
  end = std::max(last.end, first.begin);
  common_begin = last.begin;
  common_end = first.end;
  origin = begin - begin % kKeysPerTile;
  tiles = ceil_div(end - origin, kKeysPerTile);
}

template <class T>
void carve(Block<T>& b, Arena& arena) {
  b.centre = arena.take<T>(b.key_row);
  b.keys = arena.take<T>(b.tiles * kKeysPerTile * b.key_row);
  b.keys_t = arena.take<T>(b.tiles * b.shape.key_size * kTileRow<T>);
  b.weights = arena.take<T>(b.tiles * b.rows * kTileRow<T>);
  for (T** rows : {&b.scaled, &b.offset, &b.mean}) *rows = arena.take<T>(b.rows * b.key_row);
  for (T** numbers : {&b.peak, &b.omega, &b.inverse, &b.marks}) *numbers = arena.take<T>(b.rows);
}

template <class T>
void mark_rows_that_see(Block<T>& b, int64_t key, T* marks) {
  for (int64_t r = 0; r < b.rows; ++r) {
    const Visible seen = b.seen(r);
    if (seen.begin <= key && key < seen.end) marks[r] = std::numeric_limits<T>::quiet_NaN();
  }
}

template <class T>
void load_keys(Block<T>& b, const T* k) {
  const int64_t size = b.shape.key_size;
  std::fill(b.centre, b.centre + b.key_row, T{0});
  std::fill(b.marks, b.marks + b.rows, T{0});
  for (int64_t j = b.common_begin; j < b.common_end; ++j) {
    const T* key = k + b.key_at(j) * size;
    for (int64_t d = 0; d < size; ++d) b.centre[d] += key[d];
  }
  const T count = static_cast<T>(std::max<int64_t>(b.common_end - b.common_begin, 1));
  for (int64_t d = 0; d < size; ++d) b.centre[d] /= count;
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    for (int64_t c = 0; c < kKeysPerTile; ++c) {
      const int64_t j = b.origin + tile * kKeysPerTile + c;
      T* to = b.tile_keys(tile) + c * b.key_row;
      if (j < b.begin || j >= b.end) {
        std::fill(to, to + b.key_row, T{0});
        continue;
      }
      load_row(k + b.key_at(j) * size, size, to, b.key_row);
      add_scaled(T{-1}, b.centre, to, b.width);
      if ((j < b.common_begin || j >= b.common_end) && !all_finite(to, size)) {
        std::fill(to, to + b.key_row, T{0});
        mark_rows_that_see(b, j, b.marks);
      }
    }
    transpose(b.tile_keys(tile), b.key_row, b.tile_keys_t(tile), kTileRow<T>, kKeysPerTile, size);
  }
}

template <class T>
void load_queries(Block<T>& b, const T* q) {
  const T scale = static_cast<T>(b.options.scale);
  for (int64_t r = 0; r < b.rows; ++r) {
    T *scaled = b.scaled + r * b.key_row, *offset = b.offset + r * b.key_row;
    load_row(q + b.row_at(r) * b.shape.key_size, b.shape.key_size, offset, b.key_row);
    for (int64_t d = 0; d < b.key_row; ++d) scaled[d] = scale * offset[d];
    add_scaled(T{-1}, b.centre, offset, b.width);
  }
}

// Calls row(r, columns of the tile that r sees).
template <class T, class Row>
void for_columns(const Block<T>& b, int64_t tile, const Row& row) {
  const int64_t first = b.origin + tile * kKeysPerTile;
  for (int64_t r = 0; r < b.rows; ++r) {
    const Visible seen = b.seen(r);
    row(r, Visible{std::clamp<int64_t>(seen.begin - first, 0, kKeysPerTile),
                   std::clamp<int64_t>(seen.end - first, 0, kKeysPerTile)});
  }
}

template <class T>
void fill_outside(T* row, Visible columns, T value) {
  std::fill(row, row + std::min(columns.begin, columns.end), value);
  std::fill(row + columns.end, row + kKeysPerTile, value);
}

// Scores of all tiles, then weights with the row's maximum, which all tiles together have.
template <class T>
void weigh(Block<T>& b) {
  using S = Simd<T>;
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  std::fill(b.peak, b.peak + b.rows, kLowest);
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    T* scores = b.tile_weights(tile);
    multiply<Before::kNothing>(rows_of(b.scaled, b.key_row), b.tile_keys_t(tile), kTileRow<T>, scores, kTileRow<T>,
                               b.rows, kKeysPerTile, b.shape.key_size);
    if (!b.whole(tile)) {
      for_columns(b, tile, [&](int64_t r, Visible c) { fill_outside(scores + r * kTileRow<T>, c, kLowest); });
    }
    for (int64_t r = 0; r < b.rows; ++r) {
      typename S::V most = S::set1(kLowest);
      for (int64_t c = 0; c < kKeysPerTile; c += S::kLanes) most = S::max(most, S::load(scores + r * kTileRow<T> + c));
      T lanes[S::kLanes];
      S::store(lanes, most);
      for (const T lane : lanes) b.peak[r] = lane > b.peak[r] ? lane : b.peak[r];
    }
  }
  std::fill(b.omega, b.omega + b.rows, T{0});
  for (int64_t r = 0; r < b.rows; ++r) b.peak[r] = b.peak[r] == kLowest ? T{0} : b.peak[r];
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    for (int64_t r = 0; r < b.rows; ++r) {
      T* row = b.tile_weights(tile) + r * kTileRow<T>;
      const typename S::V peak = S::set1(b.peak[r]);
      typename S::V sum = S::zero();
      for (int64_t c = 0; c < kKeysPerTile; c += S::kLanes) {
        const typename S::V w = exp(S::sub(S::load(row + c), peak));
        S::store(row + c, w);
        sum = S::add(sum, w);
      }
      b.omega[r] += S::sum(sum);
    }
  }
  for (int64_t r = 0; r < b.rows; ++r) {
    b.omega[r] += b.marks[r];
    b.inverse[r] = b.omega[r] == T{0} ? T{0} : T{1} / b.omega[r];
  }
}

// sums [rows, key_row] = weights times keys, over omega.
template <class T>
void average_keys(Block<T>& b) {
  std::fill(b.mean, b.mean + b.rows * b.key_row, T{0});
  for (int64_t tile = 0; tile < b.tiles; ++tile) {
    multiply<Before::kKeep>(rows_of(b.tile_weights(tile), kTileRow<T>), b.tile_keys(tile), b.key_row, b.mean, b.key_row,
                            b.rows, b.width, kKeysPerTile);
  }
  for (int64_t r = 0; r < b.rows; ++r) {
    for (int64_t d = 0; d < b.width; ++d) b.mean[r * b.key_row + d] *= b.inverse[r];
  }
}

template <class T>
void prepare(Block<T>& b, const T* q, const T* k) {
  load_keys(b, k);
  load_queries(b, q);
  weigh(b);
  average_keys(b);
}

// What lambda counts for beside a covariance: lambda, or lambda over the sum of unshifted weights. Clamped, so that an
// infinite one gives softmax attention rather than NaN.
template <class T>
void ridges(const Block<T>& b, const T* ridge, T* lambda, T* factor) {
  constexpr T kMost = static_cast<T>(1e30);
  for (int64_t r = 0; r < b.rows; ++r) {
    factor[r] = T{1};
    if (b.omega[r] == T{0}) {  // no keys: anything regular
      lambda[r] = T{1};
      continue;
    }
    if (b.options.absolute) {
      const T at_centre = dot(b.scaled + r * b.key_row, b.centre, b.width);
      factor[r] = std::min(std::exp(-(b.peak[r] + at_centre)) * b.inverse[r], kMost);
    }
    const T value = ridge[b.row_at(r)] * factor[r];
    lambda[r] = value > kMost ? kMost : value;
  }
}

// A tile of values, sanitized like keys; marks [rows] as in Block.
template <class T>
void load_values(Block<T>& b, const T* v, int64_t tile, T* values, T* marks) {
  const int64_t size = b.shape.value_size;
  for (int64_t c = 0; c < kKeysPerTile; ++c) {
    const int64_t j = b.origin + tile * kKeysPerTile + c;
    T* to = values + c * b.value_row;
    if (j < b.begin || j >= b.end) {
      std::fill(to, to + b.value_row, T{0});
      continue;
    }
    load_row(v + b.key_at(j) * size, size, to, b.value_row);
    if ((j < b.common_begin || j >= b.common_end) && !all_finite(to, size)) {
      std::fill(to, to + b.value_row, T{0});
      mark_rows_that_see(b, j, marks);
    }
  }
}

}  // namespace
}  // namespace tilewright::local_linear_attention
