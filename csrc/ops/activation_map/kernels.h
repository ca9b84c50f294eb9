// SPDX-License-Identifier: Apache-2.0
// y = (1 + s (w - 1)) x + s b, coordinate by coordinate: an affine map on one activation, s how much of it. In float32.
#pragma once

#include <cstdint>

#include "isa/isa.h"

namespace tilewright::activation_map {

struct Problem {
  int64_t width;
  const float* weight;  // w [width]
  const float* bias;  // b [width]
  float strength;  // s
  bool add;  // y += instead of y =
};

// x, y: [width]; y may be x.
using Apply = void (*)(const Problem&, const float* x, float* y);

namespace generic {
void apply(const Problem&, const float* x, float* y);
}
namespace avx2 {
void apply(const Problem&, const float* x, float* y);
}
namespace avx512 {
void apply(const Problem&, const float* x, float* y);
}

inline Apply kernel() {
#if defined(__x86_64__)
  static constexpr isa::Table<Apply> table{{generic::apply, avx2::apply, avx512::apply, avx512::apply}};
  return table.pick();
#else
  return generic::apply;
#endif
}

}  // namespace tilewright::activation_map
