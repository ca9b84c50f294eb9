// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_linear/reference.h"

#include "format/fp8.h"
#include "ops/int4_linear/activation.h"

namespace tilewright::int4_linear {
namespace {

double activation_code(const Problem& p, int64_t m, int64_t k) {
  const int64_t kp = p.weight.padded_k();
  if (p.activation == Activation::kInt8) return static_cast<const int8_t*>(p.x.codes)[m * kp + k];
  const auto* row = static_cast<const uint16_t*>(p.x.codes) + m * kp + (k / 8) * 8;
  for (int slot = 0; slot < 8; ++slot) {
    if (kPairOrder[slot] == k % 8) return format::bf16_to_float(row[slot]);
  }
  return 0.0;
}

double weight_value(const Problem& p, int64_t n, int64_t k) {
  const format::Int4Lane lane = format::int4_lane(p.weight, n, k / p.weight.group);
  const double value = static_cast<double>(format::int4_code(p.weight, n, k) - lane.zero) * lane.scale;
  if (p.mode == Mode::kFold) return format::E4M3::round(static_cast<float>(value));
  return value + lane.minimum;
}

}  // namespace

void reference(const Problem& p, double* y) {
  for (int64_t m = 0; m < p.m; ++m) {
    const float* scales = p.x.scales + m * ceil_div(p.weight.k, p.scale_group);
    for (int64_t n = 0; n < p.weight.n; ++n) {
      double sum = 0.0;
      for (int64_t k = 0; k < p.weight.k; ++k) {
        sum += activation_code(p, m, k) * weight_value(p, n, k) * scales[k / p.scale_group];
      }
      sum /= static_cast<double>(p.weight.per_tensor_scale);
      y[m * p.weight.n + n] = sum + (p.bias != nullptr ? p.bias[n] : 0.0f);
    }
  }
}

}  // namespace tilewright::int4_linear
