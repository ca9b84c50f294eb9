// SPDX-License-Identifier: Apache-2.0
// The chunk form, backward: one head of one sequence, segment by segment from the end. A segment's states are recomputed
// from the state kept before it, then its chunks are gone through in reverse. Notation: the room's README.
#pragma once

#include "ops/linear_attention/cpu/chunk.h"
#include "ops/linear_attention/kernels.h"

namespace tilewright::linear_attention {
namespace {

template <class T, Rule kRule, Decay kDecay>
class Backward {
  using C = Chunk<T, kRule, kDecay>;
  using S = Simd<T>;
  using V = typename S::V;
  static constexpr int64_t kTokens = C::kTokens;

 public:
  Backward(const Problem<T>& p, const Gradients<T>& gradients, int64_t task)
      : p_(p), to_(gradients), chunk_(p), head_(task % p.value_heads), sequence_(task / p.value_heads) {
    columns_ = padded<T>(p.value_size);
    ldv_ = leading<T>(p.value_size);
    ldk_ = chunk_.ldk();
    ldp_ = chunk_.ldp();
    lds_ = leading<T>(C::kStack * kTokens);
    Carver<T> count(nullptr);
    place(count);
    Carver<T> carver(static_cast<T*>(thread_memory(count.used() * static_cast<int64_t>(sizeof(T)))));
    place(carver);
  }

  void run() {
    const int64_t first = p_.sequences.first(sequence_), last = p_.sequences.last(sequence_);
    if (first == last) return;
    T* held = to_.d_state + (sequence_ * p_.value_heads + head_) * p_.state_size();
    load_state(held, d_state_);
    const int64_t segments = ceil_div(last - first, segment_tokens(kDecay));
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t begin = first + segment * segment_tokens(kDecay);
      const int64_t end = std::min(begin + segment_tokens(kDecay), last);
      const int64_t kept = p_.first_segment[sequence_] + segment;
      load_state(p_.checkpoints + (kept * p_.value_heads + head_) * p_.state_size(), state(0));
      const int64_t chunks = ceil_div(end - begin, kTokens);
      for (int64_t c = 0; c < chunks; ++c) recompute(c, begin + c * kTokens, end);
      for (int64_t c = chunks - 1; c >= 0; --c) reverse(c, begin + c * kTokens, end);
    }
    for (int64_t d = 0; d < p_.key_size; ++d) {
      std::copy(d_state_ + d * ldv_, d_state_ + d * ldv_ + p_.value_size, held + d * p_.value_size);
    }
  }

 private:
  void place(Carver<T>& carver) {
    chunk_.place(carver);
    const int64_t values = kTokens * ldv_, keys = kTokens * ldk_;
    states_ = carver.take((kSegment + 1) * p_.key_size * ldv_);
    writes_ = carver.take(kSegment * values);
    errors_ = carver.take(C::kDelta ? kSegment * values : 0);
    d_state_ = carver.take(p_.key_size * ldv_);
    d_out_ = carver.take(2 * values);
    d_write_value_ = carver.take(values);
    scaled_ = carver.take(kDecay == Decay::kToken ? 2 * values : 0);
    scaled_t_ = carver.take(columns_ * lds_);
    writes_t_ = carver.take(columns_ * ldp_);
    pairs_ = carver.take(2 * kTokens * ldp_);
    d_in_t_ = carver.take(p_.key_size * lds_);
    d_onto_t_ = carver.take(p_.key_size * ldp_);
    d_read_ = carver.take(2 * keys);
    d_write_ = carver.take(keys);
    inner_ = carver.take(C::kChannel ? 2 * keys : 0);
    inner_write_ = carver.take(C::kChannel ? keys : 0);
    d_gate_ = carver.take(keys);
  }

  T* state(int64_t c) const { return states_ + c * p_.key_size * ldv_; }
  T* writes(int64_t c) const { return writes_ + c * kTokens * ldv_; }
  T* errors(int64_t c) const { return errors_ + c * kTokens * ldv_; }

  void load_state(const T* from, T* to) const {
    for (int64_t d = 0; d < p_.key_size; ++d) {
      T* row = to + d * ldv_;
      std::fill(std::copy(from + d * p_.value_size, from + (d + 1) * p_.value_size, row), row + columns_, T{0});
    }
  }

  // The state behind chunk c.
  void recompute(int64_t c, int64_t first, int64_t end) {
    chunk_.load_writes(sequence_, head_, first, std::min(kTokens, end - first));
    if constexpr (C::kDelta) {
      const Rows<const T> kept{p_.errors.data, p_.errors.batch, p_.errors.token, p_.errors.head};
      chunk_.load_values(kept, 0, p_.value_size, errors(c), ldv_, columns_);
      for (int64_t i = 0; i < chunk_.rows(); ++i) {
        C::scale_row(chunk_.beta()[i], errors(c) + i * ldv_, writes(c) + i * ldv_, columns_);
      }
    } else {
      chunk_.load_values(p_.v, 0, p_.value_size, writes(c), ldv_, columns_);
    }
    chunk_.update_state(writes(c), state(c), state(c + 1), ldv_, columns_);
  }

  void reverse(int64_t c, int64_t first, int64_t end) {
    chunk_.load(sequence_, head_, first, std::min(kTokens, end - first));
    chunk_.load_values(to_.d_out, 0, p_.value_size, d_out_, ldv_, columns_);
    transpose(writes(c), ldv_, writes_t_, ldp_, chunk_.rows(), columns_);
    differentiate_writes(c);
    differentiate_products();
    differentiate_rows(c);
    differentiate_decay(c);
    store_rows();
    advance();
  }

  // dU = P^T dO + K_out dS. Delta: the gradient dY of the errors from it, -dR = -diag(beta) dY below dO in d_out_, and
  // dV = dR, dbeta = dY . W. Additive: dV = dU.
  void differentiate_writes(int64_t c) {
    const int64_t rows = chunk_.rows();
    T* dy = d_write_value_;
    T* minus_dr = d_out_ + rows * ldv_;
    multiply<Before::kNothing>(rows_of(chunk_.out(), ldk_), d_state_, ldv_, dy, ldv_, rows, columns_, p_.key_size);
    multiply<Before::kKeep>(columns_of(chunk_.queries_keys(), ldp_), d_out_, ldv_, dy, ldv_, rows, columns_, rows);
    if constexpr (C::kDelta) chunk_.solve_transposed(dy, minus_dr, ldv_, columns_);
    for (int64_t i = 0; i < chunk_.tokens(); ++i) {
      T* dv = to_.dv.row(chunk_.batch(), chunk_.first() + i, head_);
      V d_beta = S::zero();
      for (int64_t v = 0; v < p_.value_size; v += S::kLanes) {
        const int64_t at = i * ldv_ + v;
        const V y = S::load(dy + at);
        S::store_first(dv + v, C::kDelta ? S::sub(S::zero(), S::load(minus_dr + at)) : y, p_.value_size - v);
        if constexpr (C::kDelta) d_beta = S::fma(y, S::load(errors(c) + at), d_beta);
      }
      if constexpr (C::kDelta) *to_.dbeta.row(chunk_.batch(), chunk_.first() + i, head_) = S::sum(d_beta);
    }
    const T* scaled = d_out_;
    if constexpr (kDecay == Decay::kToken) {
      for (int64_t r = 0; r < C::kStack * rows; ++r) {
        C::scale_row(chunk_.into()[r % rows], d_out_ + r * ldv_, scaled_ + r * ldv_, columns_);
      }
      scaled = scaled_;
    }
    through_state_ = scaled;
  }

  // pairs_ = the gradients E of Q K^T and, below them, N of K K^T, decays a token included.
  void differentiate_products() {
    const int64_t rows = chunk_.rows();
    multiply<Before::kNothing>(rows_of<T>(d_out_, ldv_), writes_t_, ldp_, pairs_, ldp_, C::kStack * rows, rows,
                               columns_);
    chunk_.mask(pairs_, false);
    if constexpr (C::kDelta) chunk_.mask(pairs_ + rows * ldp_, true);
  }

  // d_read_ = dQ and, below it, the gradient of the keys in their role of reading errors; d_write_ = in that of writing.
  void differentiate_rows(int64_t c) {
    const int64_t rows = chunk_.rows(), stack = C::kStack * rows;
    transpose(through_state_, ldv_, scaled_t_, lds_, stack, columns_);
    multiply<Before::kNothing>(rows_of<T>(state(c), ldv_), scaled_t_, lds_, d_in_t_, lds_, p_.key_size, stack,
                               p_.value_size);
    multiply<Before::kNothing>(rows_of<T>(d_state_, ldv_), writes_t_, ldp_, d_onto_t_, ldp_, p_.key_size, rows,
                               p_.value_size);
    clear_tails(stack);
    transpose(d_in_t_, lds_, d_read_, ldk_, p_.key_size, stack);
    transpose(d_onto_t_, ldp_, d_write_, ldk_, p_.key_size, rows);
    const int64_t width = padded<T>(p_.key_size);
    if constexpr (!C::kChannel) {
      multiply<Before::kKeep>(rows_of<T>(pairs_, ldp_), chunk_.minus(), ldk_, d_read_, ldk_, stack, width, rows);
      multiply<kDecay == Decay::kToken ? Before::kScale : Before::kKeep>(columns_of<T>(pairs_, ldp_), chunk_.plus(),
                                                                         ldk_, d_write_, ldk_, rows, width, stack,
                                                                         {.row_scale = chunk_.onto()});
    } else {
      for (int64_t r = 0; r < C::kStack; ++r) scale(chunk_.into(), d_read_ + r * rows * ldk_);
      scale(chunk_.onto(), d_write_);
      chunk_.factored() ? add_factored_pairs(width, stack) : add_pairs();
    }
  }

  void clear_tails(int64_t stack) {
    for (int64_t i = 0; i < stack; ++i) {
      std::fill(d_read_ + i * ldk_ + p_.key_size, d_read_ + (i + 1) * ldk_, T{0});
    }
    for (int64_t i = 0; i < chunk_.rows(); ++i) {
      std::fill(d_write_ + i * ldk_ + p_.key_size, d_write_ + (i + 1) * ldk_, T{0});
    }
  }

  void scale(const T* factors, T* rows) const {
    for (int64_t i = 0; i < chunk_.rows(); ++i) {
      for (int64_t d = 0; d < padded<T>(p_.key_size); d += S::kLanes) {
        T* at = rows + i * ldk_ + d;
        S::store(at, S::mul(S::load(factors + i * ldk_ + d), S::load(at)));
      }
    }
  }

  void add_scaled(const T* factors, const T* from, T* to) const {
    for (int64_t i = 0; i < chunk_.rows(); ++i) {
      for (int64_t d = 0; d < padded<T>(p_.key_size); d += S::kLanes) {
        const int64_t at = i * ldk_ + d;
        S::store(to + at, S::fma(S::load(factors + at), S::load(from + at), S::load(to + at)));
      }
    }
  }

  void add_factored_pairs(int64_t width, int64_t stack) {
    const int64_t rows = chunk_.rows();
    multiply<Before::kNothing>(rows_of<T>(pairs_, ldp_), chunk_.minus(), ldk_, inner_, ldk_, stack, width, rows);
    multiply<Before::kNothing>(columns_of<T>(pairs_, ldp_), chunk_.plus(), ldk_, inner_write_, ldk_, rows, width,
                               stack);
    for (int64_t r = 0; r < C::kStack; ++r) {
      add_scaled(chunk_.plus_factor(), inner_ + r * rows * ldk_, d_read_ + r * rows * ldk_);
    }
    add_scaled(chunk_.minus_factor(), inner_write_, d_write_);
  }

  void add_pairs() {
    const int64_t rows = chunk_.rows();
    chunk_.each_pair([&](int64_t i, int64_t j, const T* key, const T* decay) {
      const V with_query = S::set1(pairs_[i * ldp_ + j]);
      const V with_key = S::set1(C::kDelta ? pairs_[(rows + i) * ldp_ + j] : T{0});
      for (int64_t d = 0; d < padded<T>(p_.key_size); d += S::kLanes) {
        const V factor = S::load(decay + d);
        const V weight = S::mul(factor, S::load(key + d));
        T* dq = d_read_ + i * ldk_ + d;
        S::store(dq, S::fma(with_query, weight, S::load(dq)));
        V read = S::mul(with_query, S::load(chunk_.raw() + i * ldk_ + d));
        if constexpr (C::kDelta) {
          T* dk = d_read_ + (rows + i) * ldk_ + d;
          S::store(dk, S::fma(with_key, weight, S::load(dk)));
          read = S::fma(with_key, S::load(chunk_.raw() + (rows + i) * ldk_ + d), read);
        }
        T* dk = d_write_ + j * ldk_ + d;
        S::store(dk, S::fma(factor, read, S::load(dk)));
      }
    });
  }

  // dg_t = sum over s >= t of the chunk of (q dq + k dk_read - k dk_write)_s, plus dS S at its end; by channel, or summed.
  void differentiate_decay(int64_t c) {
    if constexpr (kDecay == Decay::kNone) return;
    const int64_t rows = chunk_.rows();
    const T* after = state(c + 1);
    for (int64_t d = 0; d < p_.key_size; ++d) {
      V sum = S::zero();
      for (int64_t v = 0; v < columns_; v += S::kLanes) {
        sum = S::fma(S::load(d_state_ + d * ldv_ + v), S::load(after + d * ldv_ + v), sum);
      }
      d_gate_[d] = S::sum(sum);
    }
    std::fill(d_gate_ + p_.key_size, d_gate_ + padded<T>(p_.key_size), T{0});
    // A sum over tokens of differences: in double, so that only the terms are rounded.
    double total = 0;
    for (int64_t d = 0; d < p_.key_size; ++d) total += static_cast<double>(d_gate_[d]);
    for (int64_t i = chunk_.tokens() - 1; i >= 0; --i) {
      V token = S::zero();
      for (int64_t d = 0; d < padded<T>(p_.key_size); d += S::kLanes) {
        const int64_t at = i * ldk_ + d, below = rows * ldk_ + at;
        const V key = S::load(chunk_.raw() + below);
        V sum = S::mul(S::load(chunk_.raw() + at), S::load(d_read_ + at));
        V keys = S::sub(S::zero(), S::load(d_write_ + at));
        if constexpr (C::kDelta) keys = S::add(keys, S::load(d_read_ + below));
        sum = S::fma(key, keys, sum);
        if constexpr (C::kChannel) {
          sum = S::add(sum, S::load(d_gate_ + d));
          S::store(d_gate_ + d, sum);
        }
        token = S::add(token, sum);
      }
      T* to = to_.dg.row(chunk_.batch(), chunk_.first() + i, head_);
      if constexpr (C::kChannel) {
        std::copy(d_gate_, d_gate_ + p_.key_size, to);
      } else {
        total += static_cast<double>(S::sum(token));
        *to = static_cast<T>(total);
      }
    }
  }

  void store_rows() const {
    const int64_t rows = chunk_.rows();
    const V factor = S::set1(p_.scale);
    for (int64_t i = 0; i < chunk_.tokens(); ++i) {
      T* dq = to_.dq.row(chunk_.batch(), chunk_.first() + i, head_);
      T* dk = to_.dk.row(chunk_.batch(), chunk_.first() + i, head_);
      for (int64_t d = 0; d < p_.key_size; d += S::kLanes) {
        const int64_t at = i * ldk_ + d, n = p_.key_size - d;
        S::store_first(dq + d, S::mul(factor, S::load(d_read_ + at)), n);
        V key = S::load(d_write_ + at);
        if constexpr (C::kDelta) key = S::add(key, S::load(d_read_ + rows * ldk_ + at));
        S::store_first(dk + d, key, n);
      }
    }
  }

  // dS before the chunk = diag(whole) dS + Q_in^T dO - K_in^T dR.
  void advance() {
    multiply<C::kStateBefore>(columns_of(chunk_.in(), ldk_), through_state_, ldv_, d_state_, ldv_, p_.key_size,
                              columns_, C::kStack * chunk_.rows(), {.row_scale = chunk_.whole()});
  }

  const Problem<T>& p_;
  const Gradients<T>& to_;
  C chunk_;
  int64_t head_, sequence_, columns_, ldv_, ldk_, ldp_, lds_;
  T *states_, *writes_, *errors_, *d_state_, *d_out_, *scaled_, *scaled_t_, *writes_t_, *pairs_, *d_in_t_, *d_onto_t_;
  const T* through_state_;  // dO and -dR, times `into` with a decay a token
  T *d_read_, *d_write_, *d_write_value_, *inner_, *inner_write_, *d_gate_;
};

}  // namespace
}  // namespace tilewright::linear_attention
