// SPDX-License-Identifier: Apache-2.0
// Token by token, with a tile of the state's columns in registers and the first-level cache: two passes over the tile
// for the delta rule (what the key reads; then decay, write and the query's read), one for the additive rule.
#pragma once

#include <algorithm>

#include "ops/common/tile_products.h"
#include "ops/linear_attention/cpu/decay.h"
#include "ops/linear_attention/kernels.h"

namespace tilewright::linear_attention {
namespace {

template <class T, Rule kRule, Decay kDecay>
class Recurrent {
  using S = Simd<T>;
  using V = typename S::V;
  static constexpr int kVectors = 4;
  static constexpr int64_t kWide = kVectors * S::kLanes;
  // A tile that is used this often is worth copying to rows that do not share sets of the cache.
  static constexpr int64_t kCopyTokens = 4;

 public:
  Recurrent(const Problem<T>& p, int64_t task) : p_(p) {
    const int64_t part = task % p.parts;
    head_ = task / p.parts % p.value_heads;
    sequence_ = task / p.parts / p.value_heads;
    const int64_t tiles = ceil_div(p.value_size, kWide);
    first_tile_ = tiles * part / p.parts;
    last_tile_ = tiles * (part + 1) / p.parts;
    const int64_t row = padded<T>(p.key_size);
    key_ = static_cast<T*>(thread_memory((2 * row + p.key_size * kWide) * static_cast<int64_t>(sizeof(T))));
    decay_ = key_ + row;
    tile_ = decay_ + row;
  }

  void run() {
    const int64_t tokens = p_.sequences.last(sequence_) - p_.sequences.first(sequence_);
    if (tokens == 0) return;
    T* state = p_.state + (p_.slot(sequence_) * p_.value_heads + head_) * p_.state_size();
    for (int64_t tile = first_tile_; tile < last_tile_; ++tile) {
      const int64_t column = tile * kWide;
      const int64_t width = std::min(kWide, p_.value_size - column);
      if (tokens < kCopyTokens && width == kWide) {
        sweep(state + column, p_.value_size, column, width);
        continue;
      }
      for (int64_t d = 0; d < p_.key_size; ++d) {
        const T* from = state + d * p_.value_size + column;
        std::fill(std::copy(from, from + width, tile_ + d * kWide), tile_ + (d + 1) * kWide, T{0});
      }
      sweep(tile_, kWide, column, width);
      for (int64_t d = 0; d < p_.key_size; ++d) {
        std::copy(tile_ + d * kWide, tile_ + d * kWide + width, state + d * p_.value_size + column);
      }
    }
  }

 private:
  // All tokens over one tile of rows `stride` apart.
  void sweep(T* tile, int64_t stride, int64_t column, int64_t width) {
    const int64_t b = p_.sequences.batch(sequence_);
    const int64_t group = p_.value_heads / p_.heads;
    for (int64_t t = p_.sequences.first(sequence_); t < p_.sequences.last(sequence_); ++t) {
      const T* k = p_.k.row(b, t, head_ / group);
      const T* q = p_.q.row(b, t, head_ / group);
      const T* v = p_.v.row(b, t, head_) + column;
      const T scalar_decay = prepare_decay(b, t, k);
      V value[kVectors];
      for (int j = 0; j < kVectors; ++j) value[j] = S::load_first(v + j * S::kLanes, remaining(width, j));
      if constexpr (kRule == Rule::kDelta) {
        V held[kVectors];
        read(tile, stride, kDecay == Decay::kChannel ? key_ : k, held);
        const V beta = S::set1(*p_.beta.row(b, t, head_));
        const V decayed = S::set1(scalar_decay);
        for (int j = 0; j < kVectors; ++j) {
          value[j] = S::mul(beta, S::sub(value[j], kDecay == Decay::kToken ? S::mul(decayed, held[j]) : held[j]));
        }
      }
      T* out = p_.out.row(b, t, head_) + column;
      write_and_read(tile, stride, k, q, scalar_decay, value);
      for (int j = 0; j < kVectors; ++j) {
        S::store_first(out + j * S::kLanes, S::mul(value[j], S::set1(p_.scale)), remaining(width, j));
      }
    }
  }

  static int64_t remaining(int64_t width, int j) { return std::max<int64_t>(width - j * S::kLanes, 0); }

  // The token's decay: a number returned, or rows decay_ and key_ = k decay_.
  T prepare_decay(int64_t b, int64_t t, const T* k) {
    if constexpr (kDecay == Decay::kNone) return T{1};
    const T* g = p_.g.row(b, t, head_);
    if constexpr (kDecay == Decay::kToken) return exp_scalar(bounded_log(*g));
    for (int64_t d = 0; d < p_.key_size; d += S::kLanes) {
      const int64_t n = p_.key_size - d;
      const V factor = exp(bounded_log<T>(S::load_first(g + d, n)));
      S::store(decay_ + d, factor);
      S::store(key_ + d, S::mul(factor, S::load_first(k + d, n)));
    }
    return T{1};
  }

  // held = tile^T key, even and odd rows apart: twice as many chains as the additions' latency needs on one.
  void read(const T* tile, int64_t stride, const T* key, V (&held)[kVectors]) const {
    V odd[kVectors];
    for (int j = 0; j < kVectors; ++j) held[j] = odd[j] = S::zero();
    int64_t d = 0;
    for (; d + 1 < p_.key_size; d += 2) {
      const V k0 = S::set1(key[d]), k1 = S::set1(key[d + 1]);
      for (int j = 0; j < kVectors; ++j) {
        held[j] = S::fma(k0, S::load(tile + d * stride + j * S::kLanes), held[j]);
        odd[j] = S::fma(k1, S::load(tile + (d + 1) * stride + j * S::kLanes), odd[j]);
      }
    }
    for (; d < p_.key_size; ++d) {
      for (int j = 0; j < kVectors; ++j) {
        held[j] = S::fma(S::set1(key[d]), S::load(tile + d * stride + j * S::kLanes), held[j]);
      }
    }
    for (int j = 0; j < kVectors; ++j) held[j] = S::add(held[j], odd[j]);
  }

  // tile = decay tile + k value^T; value becomes tile^T q.
  void write_and_read(T* tile, int64_t stride, const T* k, const T* q, T scalar_decay, V (&value)[kVectors]) const {
    V sum[kVectors];
    for (int j = 0; j < kVectors; ++j) sum[j] = S::zero();
    for (int64_t d = 0; d < p_.key_size; ++d) {
      const V key = S::set1(k[d]), query = S::set1(q[d]);
      const V decay = S::set1(kDecay == Decay::kChannel ? decay_[d] : scalar_decay);
      T* row = tile + d * stride;
      for (int j = 0; j < kVectors; ++j) {
        V state = S::load(row + j * S::kLanes);
        if constexpr (kDecay != Decay::kNone) state = S::mul(state, decay);
        state = S::fma(key, value[j], state);
        S::store(row + j * S::kLanes, state);
        sum[j] = S::fma(query, state, sum[j]);
      }
    }
    for (int j = 0; j < kVectors; ++j) value[j] = sum[j];
  }

  const Problem<T>& p_;
  int64_t head_, sequence_, first_tile_, last_tile_;
  T *key_, *decay_, *tile_;
};

}  // namespace
}  // namespace tilewright::linear_attention
