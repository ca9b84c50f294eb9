// SPDX-License-Identifier: Apache-2.0
// One tile of keys of the backward pass, over all blocks of queries that see any of it, in their order:
//
//   dk_j = sum_i scale dscore_ij q_i - p_ij e_ij x_i - p_ij a_ij u_i        dv_j = sum_i p_ij a_ij do_i
//
// in the notation of backward_queries.h. The tile's weights and projections are formed again: eight products.
#pragma once

#include "ops/local_linear_attention/cpu/backward_queries.h"

namespace tilewright::local_linear_attention {
namespace {

template <class T>
struct KeysScratch {
  int64_t key_row, value_row, rows;
  T* centre;                                    // [key_row]
  T *keys, *keys_t;                             // [64, key_row], [K, kTileRow]
  T *values, *values_t;                         // [64, value_row], [V, kTileRow]
  T *scaled, *x, *u;                            // [rows, key_row]
  T* grad;                                      // [rows, value_row]
  T *scores, *along_x, *along_u, *gammas;       // [rows, kTileRow]
  T *dk, *dv;                                   // [64, key_row], [64, value_row]
  T* marks;                                     // [64]: NaN where a row that is not finite sees the key
};

template <class T>
void carve(KeysScratch<T>& f, const Shape& shape, Arena& arena) {
  f.key_row = leading<T>(shape.key_size);
  f.value_row = leading<T>(shape.value_size);
  f.centre = arena.take<T>(f.key_row);
  for (T** tiles : {&f.keys, &f.dk}) *tiles = arena.take<T>(kKeysPerTile * f.key_row);
  for (T** tiles : {&f.values, &f.dv}) *tiles = arena.take<T>(kKeysPerTile * f.value_row);
  f.keys_t = arena.take<T>(shape.key_size * kTileRow<T>);
  f.values_t = arena.take<T>(shape.value_size * kTileRow<T>);
  for (T** rows : {&f.scaled, &f.x, &f.u}) *rows = arena.take<T>(f.rows * f.key_row);
  f.grad = arena.take<T>(f.rows * f.value_row);
  for (T** tiles : {&f.scores, &f.along_x, &f.along_u, &f.gammas}) *tiles = arena.take<T>(f.rows * kTileRow<T>);
  f.marks = arena.take<T>(kKeysPerTile);
}

// One block of queries against the tile.
template <class T>
struct Pair {
  const Backward<T>& p;
  const KeyItem& item;
  BlockItem block;
  int64_t rows;

  int64_t row_at(int64_t r) const {
    const int64_t group = p.shape.group();
    return (block.segment.first_query + block.first + r / group) * p.shape.heads + block.kv_head * group + r % group;
  }
  Visible columns(int64_t r) const {
    const Visible seen = visible_keys(p.options, block.segment, block.first + r / p.shape.group());
    return {std::clamp<int64_t>(seen.begin - item.first, 0, item.keys),
            std::clamp<int64_t>(seen.end - item.first, 0, item.keys)};
  }
  bool sees_any() const {
    const Visible first = columns(0), last = columns(rows - 1);
    return first.begin < last.end;
  }
};

// Rows of a pair. A row that is not finite and does not see the whole tile counts as zero, and the keys that it sees are
// marked.
template <class T>
void load_rows(const Pair<T>& pair, KeysScratch<T>& f) {
  const Backward<T>& p = pair.p;
  const int64_t size = p.shape.key_size, value_size = p.shape.value_size;
  const T scale = static_cast<T>(p.options.scale);
  for (int64_t r = 0; r < pair.rows; ++r) {
    const int64_t at = pair.row_at(r);
    T *scaled = f.scaled + r * f.key_row, *x = f.x + r * f.key_row, *u = f.u + r * f.key_row;
    T* grad = f.grad + r * f.value_row;
    load_row(p.q + at * size, size, scaled, f.key_row);
    for (int64_t d = 0; d < size; ++d) scaled[d] *= scale;
    load_row(p.x + at * size, size, x, f.key_row);
    if (p.u != nullptr) load_row(p.u + at * size, size, u, f.key_row);
    load_row(p.grad + at * value_size, value_size, grad, f.value_row);
    const Visible seen = pair.columns(r);
    if (seen.end - seen.begin == kKeysPerTile) continue;
    const bool finite = all_finite(scaled, size) && all_finite(x, size) && all_finite(grad, value_size) &&
                        (p.u == nullptr || all_finite(u, size)) &&
                        all_finite(p.records + at * GradRecord::kSize, GradRecord::kSize);
    if (finite) continue;
    for (T* row : {scaled, x, u}) std::fill(row, row + f.key_row, T{0});
    std::fill(grad, grad + f.value_row, T{0});
    for (int64_t c = seen.begin; c < seen.end; ++c) f.marks[c] = std::numeric_limits<T>::quiet_NaN();
  }
}

// scores become dscore, along_x -p e, along_u p a, gammas -p a.
template <class T>
void differentiate(const Pair<T>& pair, KeysScratch<T>& f) {
  using S = Simd<T>;
  const bool given = pair.p.u == nullptr;
  for (int64_t r = 0; r < pair.rows; ++r) {
    const T* record = pair.p.records + pair.row_at(r) * GradRecord::kSize;
    const T omega = record[GradRecord::kOmega];
    const typename S::V peak = S::set1(record[GradRecord::kPeak]), mean = S::set1(record[GradRecord::kMean]);
    const typename S::V inverse = S::set1(omega == T{0} ? T{0} : T{1} / omega);
    const typename S::V level = S::set1(T{1} + record[GradRecord::kKeyX]);
    const typename S::V off = S::set1(record[GradRecord::kValue] - record[GradRecord::kKeyU]);
    T *scores = f.scores + r * kTileRow<T>, *along_x = f.along_x + r * kTileRow<T>;
    T *along_u = f.along_u + r * kTileRow<T>, *gammas = f.gammas + r * kTileRow<T>;
    for (int64_t c = 0; c < kKeysPerTile; c += S::kLanes) {
      const typename S::V weight = S::mul(exp(S::sub(S::load(scores + c), peak)), inverse);
      const typename S::V a = S::sub(level, S::load(along_x + c));
      typename S::V e = S::sub(S::load(gammas + c), off);
      if (!given) e = S::sub(e, S::load(along_u + c));
      const typename S::V weight_a = S::mul(weight, a);
      S::store(scores + c, S::mul(weight, S::sub(S::mul(e, a), mean)));
      S::store(along_x + c, S::sub(S::zero(), S::mul(weight, e)));
      S::store(along_u + c, weight_a);
      S::store(gammas + c, S::sub(S::zero(), weight_a));
    }
    const Visible seen = pair.columns(r);
    if (seen.end - seen.begin == kKeysPerTile) continue;
    const bool dropped = !all_finite(record, GradRecord::kSize);
    for (T* row : {scores, along_x, along_u, gammas}) fill_outside(row, dropped ? Visible{0, 0} : seen, T{0});
  }
}

template <class T>
void add_pair(const Pair<T>& pair, KeysScratch<T>& f) {
  const Shape& shape = pair.p.shape;
  const int64_t rows = pair.rows, size = shape.key_size;
  load_row(pair.p.centres + pair.block.block * size, size, f.centre, f.key_row);
  const Segment& segment = pair.block.segment;
  const int64_t width = padded<T>(size), value_width = padded<T>(shape.value_size);
  for (int64_t c = 0; c < pair.item.keys; ++c) {
    const int64_t key = (segment.first_key + pair.item.first + c) * shape.kv_heads + pair.item.kv_head;
    load_row(pair.p.k + key * size, size, f.keys + c * f.key_row, f.key_row);
    add_scaled(T{-1}, f.centre, f.keys + c * f.key_row, width);
  }
  transpose(f.keys, f.key_row, f.keys_t, kTileRow<T>, kKeysPerTile, size);
  load_rows(pair, f);
  const auto project = [&](const T* from, T* to) {
    multiply<Before::kNothing>(rows_of(from, f.key_row), f.keys_t, kTileRow<T>, to, kTileRow<T>, rows, kKeysPerTile,
                               size);
  };
  project(f.scaled, f.scores);
  project(f.x, f.along_x);
  if (pair.p.u != nullptr) project(f.u, f.along_u);
  multiply<Before::kNothing>(rows_of(f.grad, f.value_row), f.values_t, kTileRow<T>, f.gammas, kTileRow<T>, rows,
                             kKeysPerTile, shape.value_size);
  differentiate(pair, f);
  const auto collect = [&](const T* factors, const T* from) {
    multiply<Before::kKeep>(columns_of(factors, kTileRow<T>), from, f.key_row, f.dk, f.key_row, kKeysPerTile, width,
                            rows);
  };
  collect(f.scores, f.scaled);
  collect(f.along_x, f.x);
  if (pair.p.u != nullptr) collect(f.gammas, f.u);
  multiply<Before::kKeep>(columns_of(f.along_u, kTileRow<T>), f.grad, f.value_row, f.dv, f.value_row, kKeysPerTile,
                          value_width, rows);
}

template <class T>
void backward_tile(const Backward<T>& p, const Plan& plan, const KeyItem& item) {
  const Span& span = *item.span;
  KeysScratch<T> f{};
  f.rows = plan.queries_per_block * p.shape.group();
  Arena count{nullptr, 0};
  carve(f, p.shape, count);
  Arena arena{static_cast<char*>(thread_memory(count.used)), 0};
  carve(f, p.shape, arena);

  std::fill(f.keys, f.keys + kKeysPerTile * f.key_row, T{0});
  std::fill(f.values, f.values + kKeysPerTile * f.value_row, T{0});
  std::fill(f.dk, f.dk + kKeysPerTile * f.key_row, T{0});
  std::fill(f.dv, f.dv + kKeysPerTile * f.value_row, T{0});
  std::fill(f.marks, f.marks + kKeysPerTile, T{0});
  const int64_t size = p.shape.key_size, value_size = p.shape.value_size;
  const auto row_of = [&](int64_t c) {
    return (span.segment.first_key + item.first + c) * p.shape.kv_heads + item.kv_head;
  };
  for (int64_t c = 0; c < item.keys; ++c) {
    load_row(p.v + row_of(c) * value_size, value_size, f.values + c * f.value_row, f.value_row);
  }
  transpose(f.values, f.value_row, f.values_t, kTileRow<T>, kKeysPerTile, value_size);
  for (int64_t block = 0; block < span.blocks; ++block) {
    const int64_t first = block * plan.queries_per_block;
    const int64_t queries = std::min(plan.queries_per_block, span.segment.queries - first);
    const Pair<T> pair{
        p,
        item,
        {span.segment, span.first_block + item.kv_head * span.blocks + block, item.kv_head, first, queries},
        queries * p.shape.group()};
    if (pair.sees_any()) add_pair(pair, f);
  }
  for (int64_t c = 0; c < item.keys; ++c) {
    const int64_t at = row_of(c);
    for (int64_t d = 0; d < size; ++d) p.dk[at * size + d] = f.dk[c * f.key_row + d] + f.marks[c];
    for (int64_t d = 0; d < value_size; ++d) p.dv[at * value_size + d] = f.dv[c * f.value_row + d] + f.marks[c];
  }
}

}  // namespace
}  // namespace tilewright::local_linear_attention
