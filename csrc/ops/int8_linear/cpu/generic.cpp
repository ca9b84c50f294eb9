// SPDX-License-Identifier: Apache-2.0
// Plain C++; codes are int16 [Kp].
#include <cmath>

#include "ops/int8_linear/cpu/prepare.h"
#include "ops/int8_linear/kernels.h"

namespace tilewright::int8_linear::generic {

using format::Int8;

void blocks(const Problem& p, int64_t first, int64_t last) {
  const format::Int8View& w = p.weight;
  for (int64_t n = first * Int8::kRowsPerBlock; n < std::min(w.n, last * Int8::kRowsPerBlock); ++n) {
    for (int64_t m = 0; m < p.m; ++m) {
      const auto* x = reinterpret_cast<const int16_t*>(p.x.codes) + m * w.padded_k();
      float total = 0.0f;
      for (int64_t g = 0; g < w.groups; ++g) {
        int32_t dot = 0;
        for (int64_t k = g * Int8::kGroup; k < (g + 1) * Int8::kGroup; ++k) dot += format::int8_code(w, n, k) * x[k];
        total = std::fma(format::int8_scale(w, n, g), static_cast<float>(dot), total);
      }
      p.y[m * p.y_stride + n] = total * p.x.scales[m];
    }
  }
}

float prepare(const float* x, int64_t k, uint8_t* codes, int32_t* group_sums) {
  auto* out = reinterpret_cast<int16_t*>(codes);
  return prepare_token(x, k, group_sums, [out](int64_t i, const IntLanes& lanes) {
    for (int j = 0; j < kLanes; ++j) out[i + j] = static_cast<int16_t>(lanes[j]);
  });
}

}  // namespace tilewright::int8_linear::generic
