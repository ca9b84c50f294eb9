// SPDX-License-Identifier: Apache-2.0
// The chunk form, forward: one head of one sequence, or some of its value columns, chunk after chunk.
#pragma once

#include "ops/linear_attention/cpu/chunk.h"

namespace tilewright::linear_attention {
namespace {

template <class T, Rule kRule, Decay kDecay>
class Forward {
  using C = Chunk<T, kRule, kDecay>;
  using S = Simd<T>;

 public:
  Forward(const Problem<T>& p, int64_t task) : p_(p), chunk_(p) {
    const int64_t part = task % p.parts;
    head_ = task / p.parts % p.value_heads;
    sequence_ = task / p.parts / p.value_heads;
    // Whole vectors to each part; the last takes the tail.
    const int64_t vectors = ceil_div(p.value_size, S::kLanes);
    first_column_ = vectors * part / p.parts * S::kLanes;
    width_ = std::min(vectors * (part + 1) / p.parts * S::kLanes, p.value_size) - first_column_;
    columns_ = padded<T>(width_);
    ldv_ = leading<T>(width_);
    Carver<T> count(nullptr);
    place(count);
    thread_local Scratch memory;
    Carver<T> carver(memory.get<T>(count.used()));
    place(carver);
  }

  void run() {
    if (width_ <= 0) return;
    const int64_t first = p_.sequences.first(sequence_), last = p_.sequences.last(sequence_);
    if (first == last) return;
    T* held = p_.state + (p_.slot(sequence_) * p_.value_heads + head_) * p_.state_size() + first_column_;
    load_state(held);
    for (int64_t t = first; t < last; t += C::kTokens) {
      if (p_.checkpoints != nullptr && (t - first) % segment_tokens(kDecay) == 0) {
        const int64_t segment = p_.first_segment[sequence_] + (t - first) / segment_tokens(kDecay);
        store_state(p_.checkpoints + (segment * p_.value_heads + head_) * p_.state_size() + first_column_);
      }
      chunk_.load(sequence_, head_, t, std::min(C::kTokens, last - t));
      advance();
    }
    store_state(held);
  }

 private:
  void place(Carver<T>& carver) {
    chunk_.place(carver);
    state_ = carver.take(p_.key_size * ldv_);
    read_ = carver.take(2 * C::kTokens * ldv_);
    u_ = carver.take(C::kTokens * ldv_);
    errors_ = carver.take(C::kDelta ? C::kTokens * ldv_ : 0);
  }

  void advance() {
    const int64_t rows = chunk_.rows();
    chunk_.load_values(p_.v, first_column_, width_, C::kDelta ? errors_ : u_, ldv_, columns_);
    // Queries and keys meet the state together: it is read once.
    multiply<Before::kNothing>(rows_of(chunk_.in(), chunk_.ldk()), state_, ldv_, read_, ldv_, C::kStack * rows,
                               columns_, p_.key_size);
    if constexpr (C::kDelta) {
      chunk_.solve(read_ + rows * ldv_, errors_, u_, ldv_, columns_);
      if (p_.errors.data != nullptr) store_rows(errors_, p_.errors);
    }
    multiply<C::kReadBefore>(rows_of(chunk_.queries_keys(), chunk_.ldp()), u_, ldv_, read_, ldv_, rows, columns_, rows,
                             {.row_scale = chunk_.into()});
    store_rows(read_, p_.out);
    chunk_.update_state(u_, state_, state_, ldv_, columns_);
  }

  void store_rows(const T* from, const Rows<T>& to) const {
    for (int64_t i = 0; i < chunk_.tokens(); ++i) {
      std::copy(from + i * ldv_, from + i * ldv_ + width_,
                to.row(chunk_.batch(), chunk_.first() + i, head_) + first_column_);
    }
  }

  void load_state(const T* from) {
    for (int64_t d = 0; d < p_.key_size; ++d) {
      T* row = state_ + d * ldv_;
      std::fill(std::copy(from + d * p_.value_size, from + d * p_.value_size + width_, row), row + columns_, T{0});
    }
  }

  void store_state(T* to) const {
    for (int64_t d = 0; d < p_.key_size; ++d) {
      std::copy(state_ + d * ldv_, state_ + d * ldv_ + width_, to + d * p_.value_size);
    }
  }

  const Problem<T>& p_;
  C chunk_;
  int64_t head_, sequence_, first_column_, width_, columns_, ldv_;
  T *state_, *read_, *u_, *errors_;
};

}  // namespace
}  // namespace tilewright::linear_attention
