// SPDX-License-Identifier: Apache-2.0
// y = weight * x / sqrt(mean(x^2) + eps) over one token (Zhang and Sennrich 2019, eq. 4), in float32.
// Squares are summed in 16 interleaved lanes, then by halving: relative error of the mean below (n/16 + 5) * 2^-24.
#pragma once

#include <cstdint>

#include "isa/isa.h"

namespace tilewright::rms_norm {

// x, weight, y: [n]; y may be x.
using Normalize = void (*)(const float* x, const float* weight, int64_t n, float eps, float* y);

namespace generic {
void normalize(const float* x, const float* weight, int64_t n, float eps, float* y);
}
namespace avx2 {
void normalize(const float* x, const float* weight, int64_t n, float eps, float* y);
}
namespace avx512 {
void normalize(const float* x, const float* weight, int64_t n, float eps, float* y);
}

inline Normalize kernel() {
#if defined(__x86_64__)
  static constexpr isa::Table<Normalize> table{
      {generic::normalize, avx2::normalize, avx512::normalize, avx512::normalize}};
  return table.pick();
#else
  return generic::normalize;
#endif
}

}  // namespace tilewright::rms_norm
