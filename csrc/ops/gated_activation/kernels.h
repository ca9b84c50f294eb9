// SPDX-License-Identifier: Apache-2.0
// y = act(gate) * up: the middle of a gated MLP (Shazeer 2020). act is silu(x) = x / (1 + e^-x) (SwiGLU), with a relative
// error below 5 units in the last place of float32, or the square of max(x, 0) (BitNet b1.58 2B4T, arXiv 2504.12285), with
// two roundings. NaN and infinite gates propagate.
#pragma once

#include <cstdint>

#include "isa/isa.h"

namespace tilewright::gated_activation {

// gate, up, y: [n]; y may be gate or up.
using Multiply = void (*)(const float* gate, const float* up, int64_t n, float* y);

enum class Function : int64_t { kSilu = 0, kSquaredRelu = 1 };

namespace generic {
void silu_multiply(const float* gate, const float* up, int64_t n, float* y);
void squared_relu_multiply(const float* gate, const float* up, int64_t n, float* y);
}  // namespace generic
namespace avx2 {
void silu_multiply(const float* gate, const float* up, int64_t n, float* y);
void squared_relu_multiply(const float* gate, const float* up, int64_t n, float* y);
}  // namespace avx2
namespace avx512 {
void silu_multiply(const float* gate, const float* up, int64_t n, float* y);
void squared_relu_multiply(const float* gate, const float* up, int64_t n, float* y);
}  // namespace avx512

inline Multiply kernel(Function function = Function::kSilu) {
  const bool silu = function == Function::kSilu;
#if defined(__x86_64__)
  static constexpr isa::Table<Multiply> silus{
      {generic::silu_multiply, avx2::silu_multiply, avx512::silu_multiply, avx512::silu_multiply}};
  static constexpr isa::Table<Multiply> squares{{generic::squared_relu_multiply, avx2::squared_relu_multiply,
                                                 avx512::squared_relu_multiply, avx512::squared_relu_multiply}};
  return silu ? silus.pick() : squares.pick();
#else
  return silu ? generic::silu_multiply : generic::squared_relu_multiply;
#endif
}

}  // namespace tilewright::gated_activation
