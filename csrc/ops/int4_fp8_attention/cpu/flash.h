// SPDX-License-Identifier: Apache-2.0
// The walk that the vector levels share: tiles of keys, decoded once into panels, against strips of query rows, with
// the online softmax. Isa is a type of the including file alone, so that no two levels share an instantiation; it gives
// the vector type F, the panel unit, and how to decode keys and values.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "ops/int4_fp8_attention/cpu/direct.h"
#include "ops/int4_fp8_attention/cpu/multiply.h"
#include "ops/int4_fp8_attention/cpu/query.h"
#include "ops/int4_fp8_attention/cpu/shape.h"
#include "ops/int4_fp8_attention/cpu/softmax.h"
#include "ops/int4_fp8_attention/partials.h"

namespace tilewright::int4_fp8_attention {

template <class Isa>
class Flash {
 public:
  static void run(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
    Flash flash(p, plan);
    for (int64_t i = first; i < last; ++i) flash.run_item(item_at(p, plan, i));
  }

 private:
  using F = typename Isa::F;
  using U = typename Isa::U;
  using Unit = typename Isa::Unit;
  static constexpr int64_t kLanes = Isa::kLanes;
  static constexpr int64_t kTileDepth = kKeysPerTile / Isa::kDepthPerUnit;
  static constexpr int64_t kAhead = 8;  // rows
  static constexpr int64_t kStrip = Softmax<Isa>::kRows;

  Flash(const Problem& p, const Plan& plan) : p_(p), shape_(shape_of<Isa>(p)) {
    const int64_t rows = plan.queries_per_block * shape_.heads_per_group;
    // Twice: the first walk only counts.
    place(nullptr, rows);
    place(scratch(used_), rows);
  }

  template <class T>
  T* take(uint8_t* base, int64_t count) {
    T* at = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kCacheLine);
    return at;
  }

  void place(uint8_t* base, int64_t rows) {
    used_ = 0;
    query_ = take<Unit>(base, rows * query_stride() + kCacheLine / 4);  // packing overruns a row by less than a line
    keys_ = take<Unit>(base, shape_.key_depth * kKeysPerTile);
    values_ = take<Unit>(base, kTileDepth * value_width());
    key_scales_ = take<float>(base, shape_.scale_groups * kKeysPerTile);
    value_scales_ = take<float>(base, shape_.scale_groups * kKeysPerTile);
    scores_ = take<float>(base, kStrip * kKeysPerTile);
    weights_ = take<Unit>(base, shape_.scale_groups * kStrip * kTileDepth);
    sums_ = take<float>(base, rows * sums_stride());
    factor_ = take<float>(base, round_up(rows, kStrip));
    maximum_ = take<float>(base, round_up(rows, kStrip));
    correction_ = take<float>(base, round_up(kStrip, kLanes));
    seen_ = take<Visible>(base, rows);
    folded_ = take<Folded<Isa>>(base, rows);
    folded_sums_ = take<float>(base, rows * value_width());
  }

  int64_t query_stride() const { return shape_.key_depth * shape_.query_terms; }
  int64_t value_width() const { return shape_.value_vectors * kLanes; }
  int64_t sums_stride() const { return value_width() + kLanes; }  // the last vector holds the row's total
  int64_t position(int64_t row) const { return item_.first_position + row / shape_.heads_per_group; }

  void run_item(const Item& item) {
    item_ = item;
    rows_ = item.rows(shape_.heads_per_group);
    for (int64_t row = 0; row < rows_; ++row) {
      prefetch(query_row(p_, item, std::min(row + kAhead, rows_ - 1)));
      factor_[row] = prepare_query<Isa>(p_, shape_, query_row(p_, item, row), query_ + row * query_stride());
      maximum_[row] = -std::numeric_limits<float>::infinity();
      const Visible all = visible_keys(p_, position(row), item.length);
      seen_[row] = {std::max(all.begin, item.key_begin), std::min(all.end, item.key_end)};
    }
    std::fill(sums_, sums_ + rows_ * sums_stride(), 0.0f);
    std::fill(folded_, folded_ + rows_, Folded<Isa>{});
    folds_ = item.key_begin / kKeysPerChunk < (item.key_end - 1) / kKeysPerChunk;
    const int64_t first_tile = item.key_begin / kKeysPerTile * kKeysPerTile;
    for (int64_t tile = first_tile; tile < item.key_end; tile += kKeysPerTile) {
      if (tile % kKeysPerChunk == 0 && tile != first_tile) fold();
      load_scales(tile, p_.cache.k_scales, key_scales_);
      load_scales(tile, p_.cache.v_scales, value_scales_);
      if (direct()) {
        attend_directly(tile);
        continue;
      }
      decode(tile);
      for (int64_t row = 0; row < rows_; row += kStrip) attend(tile, row, std::min(rows_, row + kStrip));
    }
    finish();
  }

  // Rows of q and out lie a token apart, which hardware prefetchers do not follow.
  void prefetch(const float* row) const {
    for (int64_t d = 0; d < shape_.head_dim; d += kCacheLine / 4) __builtin_prefetch(row + d);
  }

  Rows rows_of(const uint8_t* data, int64_t tile) const {
    const Strides& stride = p_.cache.data;
    const int64_t at = item_.sequence * stride.sequence + item_.kv_head * stride.head + tile * stride.token;
    return {data + at, stride.token, std::min(kKeysPerTile, item_.key_end - tile), shape_.row_bytes};
  }

  // Keys and values from tile into the panels, whole steps of tokens; the tail is zero.
  void decode(int64_t tile) {
    const Rows k = rows_of(p_.cache.k, tile), v = rows_of(p_.cache.v, tile);
    const int64_t tokens = round_up(k.held, kTokensPerStep);
    for (int64_t t = 0; t < tokens; t += kLanes) {
      for (int64_t word = 0; word < shape_.words; word += kWordsPerStep) {
        Isa::template keys<1>(shape_, k, t, word, [&](int64_t unit, int64_t j, const U(&x)[1]) {
          Isa::store_units(keys_ + (unit + j) * kKeysPerTile + t, x[0]);
        });
      }
    }
    Unit* out = values_;
    for (int64_t t = 0; t < tokens; t += Isa::kDepthPerUnit, out += value_width()) {
      if (!shape_.int4()) {
        Isa::value_halves(shape_, v, t, out, value_scales_ + t);
        continue;
      }
      for (int64_t n = 0; n < shape_.value_vectors; n += kCodesPerLane) {
        Isa::value_codes(v, t, n / kCodesPerLane * Isa::kPieceBytes,
                         [&](int64_t j, U x) { Isa::store_units(out + (n + j) * kLanes, x); });
      }
    }
  }

  // Scales of a tile as [group][token]; zero past the tokens.
  void load_scales(int64_t tile, const uint8_t* base, float* out) const {
    const Cache& c = p_.cache;
    const int64_t tokens = std::min(kKeysPerTile, item_.key_end - tile);
    std::fill(out, out + shape_.scale_groups * kKeysPerTile, shape_.int4() ? 0.0f : 1.0f);
    if (!shape_.int4()) return;
    const uint8_t* source =
        base + item_.sequence * c.scales.sequence + item_.kv_head * c.scales.head + tile * c.scales.token;
    const int64_t size = format::scale_bytes(c.scale_type);
    for (int64_t g = 0; g < shape_.scale_groups; ++g) {
      Isa::load_scales(source + g * size, c.scales.token, c.scale_type, tokens, out + g * kKeysPerTile);
    }
  }

  // One strip of rows against the tile.
  void attend(int64_t tile, int64_t first, int64_t last) {
    const int64_t end = std::min(kKeysPerTile, seen_[last - 1].end - tile);
    if (end <= 0 || seen_[first].begin >= tile + kKeysPerTile) return;
    const int64_t vectors = ceil_div(end, kLanes);
    for (int64_t row = first; row < last; row += Isa::kRows) {
      score(row, std::min<int64_t>(Isa::kRows, last - row), vectors, scores_ + (row - first) * kKeysPerTile);
    }
    weigh(tile, first, last, vectors);
    for (int64_t row = first; row < last; row += Isa::kRows) {
      accumulate(row, row - first, std::min<int64_t>(Isa::kRows, last - row), vectors);
    }
  }

  // Few rows: decoding into registers beats the way through a panel.
  bool direct() const { return shape_.int4() && rows_ <= Isa::kDirectRows; }

  void attend_directly(int64_t tile) {
    const Rows k = rows_of(p_.cache.k, tile), v = rows_of(p_.cache.v, tile);
    const int64_t vectors = ceil_div(k.held, kLanes);
    Direct<Isa>::scores(rows_, {.shape = shape_,
                                .rows = k,
                                .vectors = vectors,
                                .left = query_,
                                .left_stride = query_stride(),
                                .scales = key_scales_,
                                .out = scores_,
                                .out_stride = kKeysPerTile,
                                .group_stride = 0});
    weigh(tile, 0, rows_, vectors);
    Direct<Isa>::values(rows_, {.shape = shape_,
                                .rows = v,
                                .vectors = vectors,
                                .left = weights_,
                                .left_stride = kTileDepth,
                                .scales = correction_,
                                .out = sums_,
                                .out_stride = sums_stride(),
                                .group_stride = kStrip * kTileDepth});
  }

  void weigh(int64_t tile, int64_t first, int64_t last, int64_t vectors) {
    Softmax<Isa>::strip({.rows = last - first,
                         .vectors = vectors,
                         .tile = tile,
                         .seen = seen_ + first,
                         .scores = scores_,
                         .factor = factor_ + first,
                         .value_scales = value_scales_,
                         .scale_groups = shape_.scale_groups,
                         .maximum = maximum_ + first,
                         .correction = correction_,
                         .totals = sums_ + first * sums_stride() + value_width(),
                         .totals_stride = sums_stride(),
                         .weights = weights_});
  }

  void score(int64_t row, int64_t rows, int64_t vectors, float* out) {
    for (int64_t v = 0; v < vectors; v += Isa::kCols) {
      const int64_t cols = std::min<int64_t>(Isa::kCols, vectors - v);
      bool add = false;
      for (int64_t g = 0; g < shape_.scale_groups; ++g) {
        const int64_t from = g * shape_.group_depth;
        for (int64_t term = 0; term < shape_.query_terms; ++term) {
          Multiply<Isa>::scores(rows, cols,
                                {.left = query_ + row * query_stride() + term * shape_.key_depth + from,
                                 .left_stride = query_stride(),
                                 .right = keys_ + from * kKeysPerTile + v * kLanes,
                                 .right_stride = kKeysPerTile,
                                 .depth = std::min(shape_.group_depth, shape_.key_depth - from),
                                 .scales = key_scales_ + g * kKeysPerTile + v * kLanes,
                                 .add = add,
                                 .out = out + v * kLanes,
                                 .out_stride = kKeysPerTile});
          add = true;
        }
      }
    }
  }

  void accumulate(int64_t row, int64_t in_strip, int64_t rows, int64_t vectors) {
    for (int64_t v = 0; v < shape_.value_vectors; v += Isa::kCols) {
      const int64_t group = v / shape_.group_vectors;
      Multiply<Isa>::values(rows, std::min<int64_t>(Isa::kCols, shape_.value_vectors - v),
                            {.left = weights_ + (group * kStrip + in_strip) * kTileDepth,
                             .left_stride = kTileDepth,
                             .right = values_ + v * kLanes,
                             .right_stride = value_width(),
                             .depth = vectors * kLanes / Isa::kDepthPerUnit,
                             .scales = correction_ + in_strip,
                             .add = true,
                             .out = sums_ + row * sums_stride() + v * kLanes,
                             .out_stride = sums_stride()});
    }
  }

  // An item that spans several chunks: adds the chunk that ends here to those before.
  void fold() {
    for (int64_t row = 0; row < rows_; ++row) {
      float* sums = sums_ + row * sums_stride();
      const float total = Isa::reduce_add(Isa::load(sums + value_width()));
      folded_[row].add(value_width(), sums, maximum_[row], total, folded_sums_ + row * value_width());
      std::fill(sums, sums + sums_stride(), 0.0f);
      maximum_[row] = -std::numeric_limits<float>::infinity();
    }
  }

  void finish() {
    if (folds_) fold();
    const bool whole = item_.chunks == 1;
    const Partial part = whole ? Partial{} : partial_of(p_, item_, item_.chunk);
    for (int64_t row = 0; row < rows_; ++row) {
      if (whole) prefetch(output_row(p_, item_, std::min(row + kAhead, rows_ - 1)));
      const float* sums = sums_ + row * sums_stride();
      if (folds_) {
        const float* folded = folded_[row].total == 0.0f ? sums : folded_sums_ + row * value_width();
        Isa::write_row(shape_, folded, folded_[row].normalizer(), output_row(p_, item_, row));
        continue;
      }
      const float total = Isa::reduce_add(Isa::load(sums + value_width()));
      if (whole) {
        Isa::write_row(shape_, sums, total == 0.0f ? 0.0f : 1.0f / total, output_row(p_, item_, row));
        continue;
      }
      Isa::write_row(shape_, sums, 1.0f, part.sums + row * shape_.head_dim);
      part.maximum[row] = maximum_[row];
      part.total[row] = total;
    }
    if (!whole) arrive<Isa>(p_, item_);
  }

  const Problem& p_;
  const Shape shape_;
  Item item_{};
  int64_t rows_ = 0;
  int64_t used_ = 0;
  Unit* query_ = nullptr;  // [rows][terms][key_depth]
  Unit* keys_ = nullptr;  // [key_depth][tokens of a tile]
  Unit* values_ = nullptr;  // [tokens / kDepthPerUnit][value_width]
  float* key_scales_ = nullptr;  // [scale_groups][tokens]
  float* value_scales_ = nullptr;
  float* scores_ = nullptr;  // [strip][tokens]
  Unit* weights_ = nullptr;  // [scale_groups][strip][tokens / kDepthPerUnit]
  float* sums_ = nullptr;  // [rows][value_width + kLanes]
  float* factor_ = nullptr;  // [rows] what turns a raw score into base-2 units
  float* maximum_ = nullptr;  // [rows] in base-2 units
  float* correction_ = nullptr;  // [strip]
  Visible* seen_ = nullptr;  // [rows]
  Folded<Isa>* folded_ = nullptr;  // [rows] the chunks before the present one, of an item that spans several
  float* folded_sums_ = nullptr;  // [rows][value_width]
  bool folds_ = false;
};

}  // namespace tilewright::int4_fp8_attention
