// SPDX-License-Identifier: Apache-2.0
// The chunk form, forward: some adjacent heads of one sequence, or some value columns of one head, chunk after chunk.
// Heads that go through time together share pages and cache lines of the inputs; their states wait in the second-level
// cache.
#pragma once

#include "ops/linear_attention/cpu/chunk.h"
#include "ops/linear_attention/kernels.h"

namespace tilewright::linear_attention {
namespace {

template <class T, Rule kRule, Decay kDecay>
class Forward {
  using C = Chunk<T, kRule, kDecay>;
  using S = Simd<T>;

 public:
  Forward(const Problem<T>& p, int64_t task) : p_(p), chunk_(p) {
    const int64_t part = task % p.parts, bands = ceil_div(p.value_heads, p.band);
    first_head_ = task / p.parts % bands * p.band;
    last_head_ = std::min(first_head_ + p.band, p.value_heads);
    sequence_ = task / p.parts / bands;
    // Whole vectors to each part; the last takes the tail.
    const int64_t vectors = ceil_div(p.value_size, S::kLanes);
    first_column_ = vectors * part / p.parts * S::kLanes;
    width_ = std::min(vectors * (part + 1) / p.parts * S::kLanes, p.value_size) - first_column_;
    columns_ = padded<T>(width_);
    ldv_ = leading<T>(width_);
    Carver<T> count(nullptr);
    place(count);
    Carver<T> carver(static_cast<T*>(thread_memory(count.used() * static_cast<int64_t>(sizeof(T)))));
    place(carver);
  }

  void run() {
    if (width_ <= 0) return;
    const int64_t first = p_.sequences.first(sequence_), last = p_.sequences.last(sequence_);
    if (first == last) return;
    for (int64_t head = first_head_; head < last_head_; ++head)
      load_state(kept(p_.state, p_.slot(sequence_), head), head);
    for (int64_t t = first; t < last; t += C::kTokens) {
      const bool keep = p_.checkpoints != nullptr && (t - first) % segment_tokens(kDecay) == 0;
      for (int64_t head = first_head_; head < last_head_; ++head) {
        if (keep) {
          const int64_t segment = p_.first_segment[sequence_] + (t - first) / segment_tokens(kDecay);
          store_state(head, kept(p_.checkpoints, segment, head));
        }
        chunk_.load(sequence_, head, t, std::min(C::kTokens, last - t));
        advance(head, state(head));
      }
    }
    for (int64_t head = first_head_; head < last_head_; ++head)
      store_state(head, kept(p_.state, p_.slot(sequence_), head));
  }

 private:
  void place(Carver<T>& carver) {
    chunk_.place(carver);
    states_ = carver.take((last_head_ - first_head_) * p_.key_size * ldv_);
    read_ = carver.take(2 * C::kTokens * ldv_);
    u_ = carver.take(C::kTokens * ldv_);
    errors_ = carver.take(C::kDelta ? C::kTokens * ldv_ : 0);
  }

  T* state(int64_t head) const { return states_ + (head - first_head_) * p_.key_size * ldv_; }

  // This task's columns of row `row` of [.., HV, K, V].
  T* kept(T* states, int64_t row, int64_t head) const {
    return states + (row * p_.value_heads + head) * p_.state_size() + first_column_;
  }

  void advance(int64_t head, T* state) {
    const int64_t rows = chunk_.rows();
    // Queries and keys meet the state together: it is read once.
    multiply<Before::kNothing>(rows_of(chunk_.in(), chunk_.ldk()), state, ldv_, read_, ldv_, C::kStack * rows, columns_,
                               p_.key_size);
    if constexpr (C::kDelta) {
      chunk_.solve(read_ + rows * ldv_, first_column_, width_, errors_, u_, ldv_, columns_);
      if (p_.errors.data != nullptr) store_rows(errors_, head, p_.errors);
    } else {
      chunk_.load_values(p_.v, first_column_, width_, u_, ldv_, columns_);
    }
    write_out(head);
    chunk_.update_state(u_, state, state, ldv_, columns_);
  }

  // Straight to the output where its rows hold whole vectors.
  void write_out(int64_t head) {
    const bool whole = width_ == columns_;
    T* to = whole ? p_.out.row(chunk_.batch(), chunk_.first(), head) + first_column_ : read_;
    multiply<C::kReadBefore, Shape::kLower>(rows_of(chunk_.queries_keys(), chunk_.ldp()), u_, ldv_, to,
                                            whole ? p_.out.token : ldv_, chunk_.tokens(), columns_, chunk_.rows(),
                                            {chunk_.into(), read_, ldv_});
    if (!whole) store_rows(read_, head, p_.out);
  }

  void store_rows(const T* from, int64_t head, const Rows<T>& to) const {
    for (int64_t i = 0; i < chunk_.tokens(); ++i) {
      std::copy(from + i * ldv_, from + i * ldv_ + width_,
                to.row(chunk_.batch(), chunk_.first() + i, head) + first_column_);
    }
  }

  void load_state(const T* from, int64_t head) const {
    for (int64_t d = 0; d < p_.key_size; ++d) {
      T* row = state(head) + d * ldv_;
      std::fill(std::copy(from + d * p_.value_size, from + d * p_.value_size + width_, row), row + columns_, T{0});
    }
  }

  void store_state(int64_t head, T* to) const {
    for (int64_t d = 0; d < p_.key_size; ++d) {
      const T* row = state(head) + d * ldv_;
      std::copy(row, row + width_, to + d * p_.value_size);
    }
  }

  const Problem<T>& p_;
  C chunk_;
  int64_t first_head_, last_head_, sequence_, first_column_, width_, columns_, ldv_;
  T *states_, *read_, *u_, *errors_;
};

}  // namespace
}  // namespace tilewright::linear_attention
