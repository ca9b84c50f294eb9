// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/lanes.h.
#include <algorithm>

#include "isa/lanes.h"
#include "ops/window_attention/kernels.h"

namespace tilewright::window_attention::TILEWRIGHT_LEVEL {
namespace {

static_assert(kRowLanes == kLanes);
constexpr int64_t kBlock = 4;   // vectors that are summed side by side

// weights[r] = scale q . k_r for kCount * 16 rows from `row` on.
template <int64_t kCount>
TILEWRIGHT_INLINE void scores_of_rows(const Problem& p, const float* q, int64_t row) {
  const int64_t rows = padded_rows(p.window);
  Lanes sums[kCount] = {};
  for (int64_t d = 0; d < p.key_size; ++d) {
    const float* keys = p.keys + d * rows + row;
    for (int64_t i = 0; i < kCount; ++i) sums[i] += q[d] * load_lanes(keys + i * kLanes);
  }
  for (int64_t i = 0; i < kCount; ++i) store_lanes(p.weights + row + i * kLanes, p.scale * sums[i]);
}

// Softmax weights, not yet divided, of the first `count` rows; zero behind them. Returns their sum.
TILEWRIGHT_INLINE float weigh(const Problem& p, const float* q, int64_t count) {
  const int64_t rows = round_up(count, kLanes);
  int64_t row = 0;
  for (; row + kBlock * kLanes <= rows; row += kBlock * kLanes) scores_of_rows<kBlock>(p, q, row);
  for (; row < rows; row += kLanes) scores_of_rows<1>(p, q, row);
  const float top = *std::max_element(p.weights, p.weights + count);
  Lanes sums = {};
  for (row = 0; row + kLanes <= count; row += kLanes) {
    const Lanes w = exp_lanes(load_lanes(p.weights + row) - top);
    store_lanes(p.weights + row, w);
    sums += w;
  }
  if (row < count) {
    // Rows that no token has written yet may hold anything.
    store_lanes(p.weights + row, exp_lanes(load_first_lanes(p.weights + row, count - row) - top));
    std::fill(p.weights + count, p.weights + row + kLanes, 0.0f);
    sums += load_lanes(p.weights + row);
  }
  return sum_lanes(sums);
}

// out[column ..] = sum of weights[r] v_r over the first `count` rows, times `factor`.
template <int64_t kCount>
TILEWRIGHT_INLINE void values_of_columns(const Problem& p, int64_t count, float factor, int64_t column, float* out) {
  Lanes sums[kCount] = {};
  for (int64_t r = 0; r < count; ++r) {
    const float* v = p.values + r * p.value_size + column;
    for (int64_t i = 0; i < kCount; ++i) sums[i] += p.weights[r] * load_lanes(v + i * kLanes);
  }
  for (int64_t i = 0; i < kCount; ++i) store_lanes(out + column + i * kLanes, factor * sums[i]);
}

TILEWRIGHT_INLINE void read(const Problem& p, const float* q, int64_t count, float* out) {
  const float sum = weigh(p, q, count);
  const float factor = p.normalize ? 1.0f / sum : 1.0f;
  int64_t column = 0;
  for (; column + kBlock * kLanes <= p.value_size; column += kBlock * kLanes) {
    values_of_columns<kBlock>(p, count, factor, column, out);
  }
  for (; column + kLanes <= p.value_size; column += kLanes) values_of_columns<1>(p, count, factor, column, out);
  if (const int64_t rest = p.value_size - column; rest > 0) {
    Lanes sums = {};
    for (int64_t r = 0; r < count; ++r) {
      sums += p.weights[r] * load_first_lanes(p.values + r * p.value_size + column, rest);
    }
    store_first_lanes(out + column, factor * sums, rest);
  }
  if (!p.normalize) out[p.value_size] = sum;
}

// Token t takes the ring's row over.
TILEWRIGHT_INLINE void write(const Problem& p, int64_t t, int64_t row, bool leaves) {
  const int64_t rows = padded_rows(p.window);
  const float* k = p.k + t * p.k_stride;
  const float* v = p.v + t * p.v_stride;
  float* k_leaving = leaves && p.k_leaving != nullptr ? p.k_leaving + t * p.k_leaving_stride : nullptr;
  float* v_leaving = leaves && p.v_leaving != nullptr ? p.v_leaving + t * p.v_leaving_stride : nullptr;
  for (int64_t d = 0; d < p.key_size; ++d) {
    float& held = p.keys[d * rows + row];
    const float before = held;
    held = k[d];
    if (k_leaving != nullptr) k_leaving[d] = before;
  }
  float* values = p.values + row * p.value_size;
  for (int64_t d = 0; d < p.value_size; ++d) {
    const float before = values[d];
    values[d] = v[d];
    if (v_leaving != nullptr) v_leaving[d] = before;
  }
}

}  // namespace

void attend(const Problem& p) {
  const int64_t width = p.value_size + (p.normalize ? 0 : 1);
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t position = p.position + t;
    write(p, t, position % p.window, position >= p.window);
    const int64_t count = std::min(position + 1, p.window);
    for (int64_t h = 0; h < p.heads; ++h) {
      read(p, p.q + t * p.q_stride + h * p.key_size, count, p.out + t * p.out_stride + h * width);
    }
  }
}

}  // namespace tilewright::window_attention::TILEWRIGHT_LEVEL
