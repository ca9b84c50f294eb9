// SPDX-License-Identifier: Apache-2.0
// y = silu(gate) * up, silu(x) = x / (1 + e^-x): the middle of a gated MLP (Shazeer 2020, SwiGLU).
// Relative error below 5 units in the last place of float32; NaN and infinite gates propagate.
#pragma once

#include <cstdint>

#include "isa/isa.h"

namespace tilewright::gated_activation {

// gate, up, y: [n]; y may be gate or up.
using SiluMultiply = void (*)(const float* gate, const float* up, int64_t n, float* y);

namespace generic {
void silu_multiply(const float* gate, const float* up, int64_t n, float* y);
}
namespace avx2 {
void silu_multiply(const float* gate, const float* up, int64_t n, float* y);
}
namespace avx512 {
void silu_multiply(const float* gate, const float* up, int64_t n, float* y);
}

inline SiluMultiply kernel() {
#if defined(__x86_64__)
  static constexpr isa::Table<SiluMultiply> table{
      {generic::silu_multiply, avx2::silu_multiply, avx512::silu_multiply, avx512::silu_multiply}};
  return table.pick();
#else
  return generic::silu_multiply;
#endif
}

}  // namespace tilewright::gated_activation
