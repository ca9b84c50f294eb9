// SPDX-License-Identifier: Apache-2.0
// One chunk of n tokens of one head, in the notation of the room's README:
//
//   into_i = exp(G_i)           what a token reads of the state before the chunk   (G: running sum of g)
//   onto_i = exp(G_n - G_i)     what of a token's write is left after the chunk
//   whole  = exp(G_n)           what is left of the state
//   products = (Q K^T, K K^T) with exp(G_i - G_j) inside, zero above the diagonal
//
// With a scalar decay exp(G_i - G_j) multiplies a finished product. With a decay a channel it sits inside the sum over
// channels and is split into exp(G_i - G_m) exp(G_m - G_j), m the middle token, as long as no factor can overflow; else
// the products are formed pair by pair from sums of g over the tokens between.
#pragma once

#include <algorithm>

#include "ops/common/tile_products.h"
#include "ops/linear_attention/cpu/decay.h"

namespace tilewright::linear_attention {
namespace {

// Hands out pieces of one allocation; without one it only counts.
template <class T>
class Carver {
 public:
  explicit Carver(T* memory) : memory_(memory) {}
  T* take(int64_t count) {
    T* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(count, kCacheLine / static_cast<int64_t>(sizeof(T)));
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  T* memory_;
  int64_t used_ = 0;
};

template <class T, Rule kRule, Decay kDecay>
class Chunk {
  using S = Simd<T>;
  using V = typename S::V;

 public:
  static constexpr int64_t kTokens = chunk_tokens(kDecay);
  static constexpr bool kDelta = kRule == Rule::kDelta;
  static constexpr bool kChannel = kDecay == Decay::kChannel;
  // Kinds of rows stacked in the products: queries, and keys where errors are read.
  static constexpr int64_t kStack = kDelta ? 2 : 1;
  // The state keeps `whole` of itself.
  static constexpr Before kStateBefore = kDecay == Decay::kNone ? Before::kKeep : Before::kScale;
  static constexpr Before kReadBefore = kDecay == Decay::kToken ? Before::kScale : Before::kKeep;
  // e^40 squared, times products of entries up to 10^3, stays below the largest float.
  static constexpr double kFactoredRange = 40.0;

  explicit Chunk(const Problem<T>& p)
      : p_(p), key_size_(p.key_size), ldk_(leading<T>(p.key_size)), ldp_(leading<T>(kTokens)) {}

  void place(Carver<T>& carver) {
    const int64_t rows = kTokens * ldk_;
    raw_ = in_ = plus_ = carver.take(2 * rows);
    if constexpr (kDecay != Decay::kNone) out_ = carver.take(rows);
    into_ = carver.take(kChannel ? rows : kTokens);
    onto_ = carver.take(kChannel ? rows : kTokens);
    if constexpr (kDecay == Decay::kToken) decays_ = carver.take(kTokens * ldp_);
    if constexpr (kChannel) {
      in_ = carver.take(2 * rows);
      plus_ = carver.take(2 * rows);
      minus_ = carver.take(rows);
      plus_factor_ = carver.take(rows);
      minus_factor_ = carver.take(rows);
      gates_ = carver.take(rows);
      pair_ = carver.take(2 * ldk_);
    }
    keys_t_ = carver.take(key_size_ * ldp_);
    products_ = carver.take(2 * kTokens * ldp_);
    lower_ = carver.take(kTokens * ldp_);
    whole_ = carver.take(ldk_);
    beta_ = carver.take(kTokens);
    // Pieces begin on cache lines, so one of T may hold doubles.
    logs_ = reinterpret_cast<double*>(carver.take(kTokens * (kChannel ? ldk_ : 1) * kPerDouble));
  }

  // Tokens [first, first + count) of sequence n: rows, decays, products.
  void load(int64_t n, int64_t head, int64_t first, int64_t count) {
    load_keys(n, head, first, count);
    load_rows(p_.q, p_.scale, raw_);
    if constexpr (kDecay == Decay::kToken) decay_products();
    if constexpr (kChannel) scale_channels();
    form_products();
  }

  // Only what update_state needs.
  void load_writes(int64_t n, int64_t head, int64_t first, int64_t count) {
    load_keys(n, head, first, count);
    if constexpr (!kChannel) return;
    for (int64_t i = 0; i < rows_; ++i) scale_writes(i * ldk_);
  }

  // after [K, columns] = what is left of before, plus the chunk's writes u [rows, columns].
  void update_state(const T* u, const T* before, T* after, int64_t ldv, int64_t columns) const {
    multiply<kStateBefore>(columns_of(out_, ldk_), u, ldv, after, ldv, key_size_, columns, rows_,
                           {whole_, before, ldv});
  }

  // v's rows of columns [first_column, first_column + width), zero up to `columns` and for missing tokens.
  void load_values(const Rows<const T>& values, int64_t first_column, int64_t width, T* to, int64_t ldv,
                   int64_t columns) const {
    for (int64_t i = 0; i < rows_; ++i) {
      T* row = to + i * ldv;
      if (i >= tokens_) {
        std::fill(row, row + columns, T{0});
        continue;
      }
      const T* from = values.row(b_, first_ + i, head_) + first_column;
      std::fill(std::copy(from, from + width, row), row + columns, T{0});
    }
  }

  // The delta rule's errors and writes over columns [first_column, first_column + width) of v:
  // w = (I + A diag(beta))^-1 (v - into K state), u = diag(beta) w, with A = K K^T as in keys_keys(). `read` holds K state.
  void solve(const T* read, int64_t first_column, int64_t width, T* w, T* u, int64_t ldv, int64_t columns) const {
    for (int64_t i = 0; i < rows_; ++i) {
      T* row = w + i * ldv;
      if (i >= tokens_) {
        std::fill(row, row + columns, T{0});
        continue;
      }
      const T* v = p_.v.row(b_, first_ + i, head_) + first_column;
      const V into = S::set1(kDecay == Decay::kToken ? into_[i] : T{1});
      for (int64_t c = 0; c < columns; c += S::kLanes) {
        V held = S::load(read + i * ldv + c);
        if constexpr (kDecay == Decay::kToken) held = S::mul(into, held);
        S::store(row + c, S::sub(S::load_first(v + c, width - c), held));
      }
    }
    for (int64_t i = 0; i < rows_; i += kSolve) {
      multiply<Before::kKeep>(rows_of<T>(lower_ + i * ldp_, ldp_), u, ldv, w + i * ldv, ldv, kSolve, columns, i);
      Substitution step;
      for (int64_t r = 0; r < kSolve; ++r) {
        step.factor[r] = beta_[i + r];
        for (int64_t s = 0; s < r; ++s) step.coefficient[r][s] = lower_[(i + r) * ldp_ + i + s];
      }
      step.run(w + i * ldv, u + i * ldv, ldv, columns);
    }
  }

  // From the gradient of u that of v, w: y = (I + diag(beta) A)^-T y in place, and minus_r = -diag(beta) y.
  void solve_transposed(T* y, T* minus_r, int64_t ldv, int64_t columns) const {
    const T* a = keys_keys();
    for (int64_t i = rows_ - kSolve; i >= 0; i -= kSolve) {
      const int64_t below = i + kSolve;
      multiply<Before::kKeep>(columns_of<T>(a + below * ldp_ + i, ldp_), minus_r + below * ldv, ldv, y + i * ldv, ldv,
                              kSolve, columns, rows_ - below);
      Substitution step;  // from the last row up
      for (int64_t r = 0; r < kSolve; ++r) {
        const int64_t row = below - 1 - r;
        step.factor[r] = -beta_[row];
        for (int64_t s = 0; s < r; ++s) step.coefficient[r][s] = a[(below - 1 - s) * ldp_ + row];
      }
      step.run(y + (below - 1) * ldv, minus_r + (below - 1) * ldv, -ldv, columns);
    }
  }

  static void scale_row(T factor, const T* from, T* to, int64_t n) {
    const V f = S::set1(factor);
    for (int64_t i = 0; i < n; i += S::kLanes) S::store(to + i, S::mul(f, S::load(from + i)));
  }

  // Multiplies [rows, rows] by exp(G_i - G_j), a decay a channel apart, and clears what is not below the diagonal (nor on
  // it, unless strict).
  void mask(T* square, bool strict) const {
    for (int64_t i = 0; i < rows_; ++i) {
      T* row = square + i * ldp_;
      const int64_t kept = strict ? i : i + 1;
      if constexpr (kDecay == Decay::kToken) {
        for (int64_t j = 0; j < kept; ++j) row[j] *= decays_[i * ldp_ + j];
      }
      std::fill(row + kept, row + rows_, T{0});
    }
  }

  int64_t tokens() const { return tokens_; }
  int64_t rows() const { return rows_; }
  int64_t ldk() const { return ldk_; }
  int64_t ldp() const { return ldp_; }
  int64_t batch() const { return b_; }
  int64_t first() const { return first_; }
  bool factored() const { return factored_; }
  const T* raw() const { return raw_; }  // [2 rows, ldk]: scaled queries, then keys
  const T* in() const { return in_; }  // the same, times exp(G) with a decay a channel
  const T* plus() const { return plus_; }  // the same, times exp(G - G_m) likewise
  const T* minus() const { return minus_; }  // keys [rows, ldk], times exp(G_m - G) likewise
  const T* out() const { return out_; }  // keys, times onto
  const T* into() const { return into_; }  // [rows], or [rows, ldk] with a decay a channel
  const T* onto() const { return onto_; }
  const T* plus_factor() const { return plus_factor_; }  // [rows, ldk]
  const T* minus_factor() const { return minus_factor_; }
  const T* whole() const { return whole_; }  // [K]
  const T* beta() const { return beta_; }
  const T* queries_keys() const { return products_; }  // Q K^T [rows, ldp]
  const T* keys_keys() const { return products_ + rows_ * ldp_; }  // K K^T [rows, ldp], strictly below the diagonal

  // Calls visit(i, j, weight) with weight_d = k_jd exp(G_id - G_jd) and decay_d its second factor, for every pair
  // j <= i: the form for decays too strong to be split.
  template <class Visit>
  void each_pair(const Visit& visit) const {
    const T* keys = raw_ + rows_ * ldk_;
    for (int64_t j = 0; j < tokens_; ++j) {
      T* sum = pair_;
      T* decay = pair_ + ldk_;
      std::fill(sum, sum + ldk_, T{0});
      for (int64_t i = j; i < tokens_; ++i) {
        for (int64_t d = 0; d < padded<T>(key_size_); d += S::kLanes) {
          V log = S::load(sum + d);
          if (i > j) log = S::add(log, S::load(gates_ + i * ldk_ + d));
          S::store(sum + d, log);
          S::store(decay + d, exp(log));
        }
        visit(i, j, keys + j * ldk_, decay);
      }
    }
  }

 private:
  static constexpr int64_t kPerDouble = static_cast<int64_t>(sizeof(double) / sizeof(T));
  static constexpr int64_t kSolve = 4;

  // kSolve rows of a triangular solve, in registers: x_r += sum over s < r of coefficient_rs y_s, y_r = factor_r x_r.
  struct Substitution {
    T coefficient[kSolve][kSolve], factor[kSolve];

    void run(T* x, T* y, int64_t step, int64_t columns) const {
      for (int64_t c = 0; c < columns; c += S::kLanes) {
        V solved[kSolve];
        for (int64_t r = 0; r < kSolve; ++r) {
          V sum = S::load(x + r * step + c);
          for (int64_t s = 0; s < r; ++s) sum = S::fma(S::set1(coefficient[r][s]), solved[s], sum);
          solved[r] = S::mul(S::set1(factor[r]), sum);
          S::store(x + r * step + c, sum);
          S::store(y + r * step + c, solved[r]);
        }
      }
    }
  };

  void load_keys(int64_t n, int64_t head, int64_t first, int64_t count) {
    b_ = p_.sequences.batch(n);
    head_ = head;
    first_ = first;
    tokens_ = count;
    rows_ = round_up(count, std::max<int64_t>(S::kLanes, kSolve));
    load_rows(p_.k, T{1}, raw_ + rows_ * ldk_);
    if constexpr (kDelta) {
      for (int64_t i = 0; i < rows_; ++i) beta_[i] = i < tokens_ ? *p_.beta.row(b_, first_ + i, head_) : T{0};
    }
    if constexpr (!kChannel) minus_ = raw_ + rows_ * ldk_;
    if constexpr (kDecay == Decay::kNone) out_ = minus_;
    if constexpr (kDecay == Decay::kToken) sum_token_gates();
    if constexpr (kChannel) sum_channel_gates();
  }

  void load_rows(const Rows<const T>& rows, T scale, T* to) const {
    const int64_t shared = head_ / (p_.value_heads / p_.heads);
    const int64_t whole = key_size_ - key_size_ % S::kLanes;
    const int64_t end = padded<T>(key_size_);
    const V factor = S::set1(scale);
    for (int64_t i = 0; i < rows_; ++i) {
      T* row = to + i * ldk_;
      if (i >= tokens_) {
        std::fill(row, row + end, T{0});
        continue;
      }
      const T* from = rows.row(b_, first_ + i, shared);
      for (int64_t d = 0; d < whole; d += S::kLanes) S::store(row + d, S::mul(S::load(from + d), factor));
      if (whole < end) S::store(row + whole, S::mul(S::load_first(from + whole, key_size_ - whole), factor));
    }
  }

  void sum_token_gates() {
    double log = 0.0;
    for (int64_t i = 0; i < rows_; ++i) {
      if (i < tokens_) log += static_cast<double>(bounded_log(*p_.g.row(b_, first_ + i, head_)));
      logs_[i] = log;
    }
    exp_differences(logs_, 1, &kNoLog, 0, rows_, into_);
    exp_differences(&log, 0, logs_, 1, rows_, onto_);
    std::fill(whole_, whole_ + key_size_, exp_scalar(static_cast<T>(log)));
    for (int64_t i = 0; i < rows_; ++i) {
      scale_row(onto_[i], minus_ + i * ldk_, out_ + i * ldk_, padded<T>(key_size_));
    }
  }

  void decay_products() {
    for (int64_t i = 0; i < rows_; ++i) {
      exp_differences(logs_ + i, 0, logs_, 1, round_up(i + 1, S::kLanes), decays_ + i * ldp_);
    }
  }

  void scale_writes(int64_t at) {
    const double* last = logs_ + (rows_ - 1) * ldk_;
    exp_differences(last, 1, logs_ + at, 1, padded<T>(key_size_), onto_ + at);
    scale(onto_ + at, raw_ + rows_ * ldk_ + at, out_ + at);
  }

  void scale_channels() {
    const int64_t end = padded<T>(key_size_);
    const double* last = logs_ + (rows_ - 1) * ldk_;
    const double* middle = logs_ + (tokens_ / 2) * ldk_;
    factored_ = true;
    for (int64_t d = 0; d < end; ++d) {
      // Written so that a NaN counts as out of range.
      factored_ = factored_ && logs_[d] - middle[d] <= kFactoredRange && middle[d] - last[d] <= kFactoredRange;
    }
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t at = i * ldk_;
      const T* query = raw_ + at;
      const T* key = raw_ + rows_ * ldk_ + at;
      scale_writes(at);
      exp_differences(logs_ + at, 1, &kNoLog, 0, end, into_ + at);
      scale(into_ + at, query, in_ + at);
      if constexpr (kDelta) scale(into_ + at, key, in_ + rows_ * ldk_ + at);
      if (!factored_) continue;
      exp_differences(logs_ + at, 1, middle, 1, end, plus_factor_ + at);
      exp_differences(middle, 1, logs_ + at, 1, end, minus_factor_ + at);
      scale(plus_factor_ + at, query, plus_ + at);
      if constexpr (kDelta) scale(plus_factor_ + at, key, plus_ + rows_ * ldk_ + at);
      scale(minus_factor_ + at, key, minus_ + at);
    }
  }

  void sum_channel_gates() {
    const int64_t end = padded<T>(key_size_);
    for (int64_t i = 0; i < rows_; ++i) {
      const T* g = i < tokens_ ? p_.g.row(b_, first_ + i, head_) : nullptr;
      T* gates = gates_ + i * ldk_;
      double* logs = logs_ + i * ldk_;
      std::fill(gates, gates + end, T{0});
      for (int64_t d = 0; g != nullptr && d < key_size_; ++d) gates[d] = bounded_log(g[d]);
      for (int64_t d = 0; d < end; ++d) logs[d] = (i == 0 ? 0.0 : logs[d - ldk_]) + static_cast<double>(gates[d]);
    }
    exp_differences(logs_ + (rows_ - 1) * ldk_, 1, &kNoLog, 0, end, whole_);
  }

  void scale(const T* factor, const T* from, T* to) const {
    for (int64_t d = 0; d < padded<T>(key_size_); d += S::kLanes) {
      S::store(to + d, S::mul(S::load(factor + d), S::load(from + d)));
    }
  }

  void form_products() {
    if (kChannel && !factored_) {
      form_products_by_pairs();
    } else {
      transpose(minus_, ldk_, keys_t_, ldp_, rows_, key_size_);
      multiply<Before::kNothing>(rows_of<T>(plus_, ldk_), keys_t_, ldp_, products_, ldp_, kStack * rows_, rows_,
                                 key_size_);
      mask(products_, false);
      if constexpr (kDelta) mask(products_ + rows_ * ldp_, true);
    }
    if constexpr (kDelta) {
      for (int64_t i = 0; i < rows_; ++i) {
        for (int64_t j = 0; j < rows_; ++j) lower_[i * ldp_ + j] = -keys_keys()[i * ldp_ + j];
      }
    }
  }

  void form_products_by_pairs() {
    std::fill(products_, products_ + kStack * rows_ * ldp_, T{0});
    each_pair([&](int64_t i, int64_t j, const T* key, const T* decay) {
      const T* q = raw_ + i * ldk_;
      const T* k = raw_ + (rows_ + i) * ldk_;
      V with_query = S::zero(), with_key = S::zero();
      for (int64_t d = 0; d < padded<T>(key_size_); d += S::kLanes) {
        const V weight = S::mul(S::load(key + d), S::load(decay + d));
        with_query = S::fma(S::load(q + d), weight, with_query);
        if constexpr (kDelta) with_key = S::fma(S::load(k + d), weight, with_key);
      }
      products_[i * ldp_ + j] = S::sum(with_query);
      if (kDelta && j < i) products_[(rows_ + i) * ldp_ + j] = S::sum(with_key);
    });
  }

  const Problem<T>& p_;
  int64_t key_size_, ldk_, ldp_;
  int64_t b_ = 0, head_ = 0, first_ = 0, tokens_ = 0, rows_ = 0;
  bool factored_ = true;
  T *raw_, *in_, *plus_, *minus_, *out_, *into_, *onto_, *plus_factor_, *minus_factor_, *gates_, *decays_, *pair_;
  T *keys_t_, *products_, *lower_, *whole_, *beta_;
  double* logs_;
};

}  // namespace
}  // namespace tilewright::linear_attention
