// SPDX-License-Identifier: Apache-2.0
// The online softmax of one strip of rows against one tile of keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "ops/int4_fp8_attention/cpu/shape.h"

namespace tilewright::int4_fp8_attention {

template <class Isa>
struct Softmax {
  using F = typename Isa::F;
  using Unit = typename Isa::Unit;
  static constexpr int64_t kRows = 24;   // a multiple of every level's kRows and of 8 lanes
  static constexpr int64_t kLanes = Isa::kLanes;
  static constexpr int64_t kVectors = kKeysPerTile / kLanes;

  struct Strip {
    int64_t rows, vectors;       // vectors of the tile that some row sees
    int64_t tile;                // first key
    const Visible* seen;         // [rows]
    const float* scores;         // [rows][kKeysPerTile]
    const float* factor;         // [rows]
    const float* value_scales;   // [scale_groups][kKeysPerTile]
    int64_t scale_groups;
    float* maximum;              // [rows] running, in base-2 units
    float* correction;           // [rows] out: what earlier sums are worth under the new maximum
    float* totals;               // [rows] vectors of running totals
    int64_t totals_stride;
    Unit* weights;  // out [scale_groups][kRows][...]: 2^(x - maximum) times the value scale, 0 if unseen
  };

  static void strip(const Strip& s) {
    alignas(64) float shift[round_up(kRows, kLanes)];
    for (int64_t r = 0; r < s.rows; ++r) shift[r] = tile_maximum(s, r);
    update_maxima(s, shift);
    for (int64_t r = 0; r < s.rows; ++r) {
      if (whole(s, r)) {
        row<true>(s, r, shift[r]);
      } else {
        row<false>(s, r, shift[r]);
      }
    }
  }

 private:
  static bool whole(const Strip& s, int64_t r) {
    return s.seen[r].begin <= s.tile && s.seen[r].end >= s.tile + kKeysPerTile;
  }

  static typename Isa::Mask mask_of(const Strip& s, int64_t r, int64_t vector) {
    const int64_t key = s.tile + vector * kLanes;
    return Isa::range(s.seen[r].begin - key, s.seen[r].end - key);
  }

  // The largest raw score that the row sees, -inf for none.
  static float tile_maximum(const Strip& s, int64_t r) {
    const F lowest = Isa::set1(-std::numeric_limits<float>::infinity());
    const float* scores = s.scores + r * kKeysPerTile;
    F best = lowest;
    if (whole(s, r)) {
      for (int64_t v = 0; v < kVectors; ++v) best = Isa::max(best, Isa::load(scores + v * kLanes));
    } else {
      for (int64_t v = 0; v < s.vectors; ++v) {
        best = Isa::max(best, Isa::select(mask_of(s, r, v), Isa::load(scores + v * kLanes), lowest));
      }
    }
    return Isa::reduce_max(best);
  }

  // In: the tile's maxima. Out: what to subtract from scores: the running maximum, or 0 while a row has seen nothing.
  static void update_maxima(const Strip& s, float* shift) {
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    alignas(64) float change[round_up(kRows, kLanes)] = {};
    for (int64_t r = 0; r < s.rows; ++r) {
      const float tile = shift[r] == kLowest ? kLowest : shift[r] * s.factor[r];
      const float fresh = std::max(s.maximum[r], tile);
      shift[r] = fresh == kLowest ? 0.0f : fresh;
      change[r] = s.maximum[r] - shift[r];
      s.maximum[r] = fresh;
    }
    for (int64_t r = 0; r < s.rows; r += kLanes) Isa::store(s.correction + r, Isa::exp2(Isa::load(change + r)));
  }

  // Tiles in the middle of a row are the common case and keep all of it in registers.
  template <bool kWhole>
  static void row(const Strip& s, int64_t r, float shift) {
    const int64_t vectors = kWhole ? kVectors : s.vectors;
    const F factor = Isa::set1(s.factor[r]), minus_shift = Isa::set1(-shift);
    const float* scores = s.scores + r * kKeysPerTile;
    F weight[kVectors];
    F total = Isa::mul(Isa::load(s.totals + r * s.totals_stride), Isa::set1(s.correction[r]));
    for (int64_t v = 0; v < vectors; ++v) {
      weight[v] = Isa::exp2(Isa::fma(Isa::load(scores + v * kLanes), factor, minus_shift));
      if constexpr (!kWhole) weight[v] = Isa::select(mask_of(s, r, v), weight[v], Isa::zero());
      total = Isa::add(total, weight[v]);
    }
    Isa::store(s.totals + r * s.totals_stride, total);
    if constexpr (!kWhole) {
      for (int64_t v = vectors; v < round_up(vectors, Isa::kDepthPerUnit); ++v) weight[v] = Isa::zero();
    }
    for (int64_t g = 0; g < s.scale_groups; ++g) {
      Unit* out = s.weights + (g * kRows + r) * (kKeysPerTile / Isa::kDepthPerUnit);
      const float* scales = s.value_scales + g * kKeysPerTile;
      for (int64_t v = 0; v < vectors; v += Isa::kDepthPerUnit) {
        F scaled[Isa::kDepthPerUnit];
        for (int64_t i = 0; i < Isa::kDepthPerUnit; ++i) {
          scaled[i] = Isa::mul(weight[v + i], Isa::load(scales + (v + i) * kLanes));
          // The scale of a key that is not seen may be NaN.
          if constexpr (!kWhole) scaled[i] = Isa::select(mask_of(s, r, v + i), scaled[i], Isa::zero());
        }
        Isa::store_weights(out + v * kLanes / Isa::kDepthPerUnit, scaled);
      }
    }
  }
};

}  // namespace tilewright::int4_fp8_attention
