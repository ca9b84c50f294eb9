// SPDX-License-Identifier: Apache-2.0
// Plain C++: always present, always correct, and the only kernel for packings that are meant for storage or elsewhere.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/ternary_linear/activation.h"
#include "ops/ternary_linear/kernels.h"

namespace tilewright::ternary_linear::generic {
namespace {

// Products of one row and one token. Sums of 128 K fit 32 bits as kMaxK says.
int32_t dot(const int8_t* row, const int8_t* x, int64_t k) {
  int32_t total = 0;
  for (int64_t i = 0; i < k; ++i) total += row[i] * x[i];
  return total;
}

}  // namespace

// A row is decoded once for all tokens.
void row_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  thread_local std::vector<int8_t> row;
  row.resize(static_cast<size_t>(p.weight.k));
  const int64_t end = std::min(p.weight.n, last * plan.rows_per_item);
  for (int64_t n = first * plan.rows_per_item; n < end; ++n) {
    format::ternary_read_row(p.weight, n, row.data());
    for (int64_t m = 0; m < p.m; ++m) p.acc[m * p.acc_stride + n] = dot(row.data(), p.x + m * p.x_stride, p.weight.k);
  }
}

void q2_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) { row_items(p, plan, first, last); }

void quantize(const float* x, int64_t k, int8_t* codes, float* scale, int32_t* sum) {
  float largest = kLeastAbsmax;
  bool finite = true;
  for (int64_t i = 0; i < k; ++i) {
    finite &= std::isfinite(x[i]);
    largest = std::max(largest, std::fabs(x[i]));
  }
  *scale = finite ? largest / kInt8Limit : std::nanf("");
  *sum = 0;
  for (int64_t i = 0; i < round_up(k, kColsPerStep); ++i) {
    codes[i] = finite && i < k ? static_cast<int8_t>(std::nearbyint(x[i] / *scale)) : int8_t{0};
    *sum += codes[i];
  }
}

int32_t sum(const int8_t* codes, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += codes[i];
  return total;
}

void finish(const Epilogue& e, int64_t first, int64_t last) {
  for (int64_t m = 0; m < e.m; ++m) {
    for (int64_t n = first; n < last; ++n) {
      const float scale = e.token_scales[m] * e.weight_scales[e.scale_per_row ? n : 0];
      const auto acc = static_cast<float>(e.acc[m * e.stride + n]);
      e.y[m * e.stride + n] = e.bias != nullptr ? std::fma(acc, scale, e.bias[n]) : acc * scale;
    }
  }
}

}  // namespace tilewright::ternary_linear::generic
