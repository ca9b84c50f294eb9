// SPDX-License-Identifier: Apache-2.0
// The equations, one after the other, in float64: the oracle, and the operator for float64 tensors.
#include "ops/sparse_gated_mlp/reference.h"

#include <cmath>

namespace tilewright::sparse_gated_mlp {
namespace {

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0.0;
  for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}

}  // namespace

double reference_activation(Function function, double z) {
  switch (function) {
    case Function::kSilu: return z / (1.0 + std::exp(-z));
    case Function::kGelu: return 0.5 * z * std::erfc(-z * 0.70710678118654752440);
    case Function::kGeluTanh: return z / (1.0 + std::exp(-2.0 * 0.79788456080286535588 * (z + 0.044715 * z * z * z)));
    case Function::kRelu: return z < 0.0 ? 0.0 : z;
  }
  return z;
}

bool reference_kept(double a, double threshold) { return !(std::fabs(a) < threshold); }

void reference(const Problem<double, double>& p) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    const double* x = p.x + t * p.stride;
    double* y = p.y + t * p.hidden;
    for (int64_t c = 0; c < p.hidden; ++c) y[c] = 0.0;
    for (int64_t j = 0; j < p.inner; ++j) {
      const double z = dot(p.gate + j * p.stride, x, p.hidden) + (p.gate_bias == nullptr ? 0.0 : p.gate_bias[j]);
      const double a = reference_activation(p.function, z);
      const bool keep = reference_kept(a, double{p.threshold[j * p.threshold_stride]});
      p.activation[t * p.inner + j] = keep ? a : 0.0;
      p.kept[t * p.inner + j] = keep;
      if (!keep) continue;
      const double h = a * (dot(p.up + j * p.stride, x, p.hidden) + (p.up_bias == nullptr ? 0.0 : p.up_bias[j]));
      for (int64_t c = 0; c < p.hidden; ++c) y[c] += h * p.down[j * p.stride + c];
    }
    for (int64_t c = 0; p.down_bias != nullptr && c < p.hidden; ++c) y[c] += p.down_bias[c];
  }
}

}  // namespace tilewright::sparse_gated_mlp
