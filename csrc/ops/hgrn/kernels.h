// SPDX-License-Identifier: Apache-2.0
// HGRN's recurrence h_t = exp(g_t) h_{t-1} + x_t, every channel for itself (Qin et al., arXiv 2311.04823, eq. 3), and its
// gradient. T is float or double. Tasks are independent, and a channel's result depends on nothing but its own inputs.
#pragma once

#include <cstdint>

#include "isa/isa.h"

namespace tilewright::hgrn {

// Channels that one task carries through all tokens of a sequence.
inline constexpr int64_t kChannels = 256;

// Rows of `width` adjacent channels, one a token; a sequence is tokens [offsets[n], offsets[n + 1]) of them.
template <class T>
struct Problem {
  int64_t sequences, width;
  const int64_t* offsets;
  const T *x, *g;  // [tokens, D]
  T* h;  // [tokens, D]; read by the backward pass
  T* state;  // [N, D]: before the first token, then after the last
};

template <class T>
struct Gradients {
  const T* initial;  // [N, D]: the state before the first token
  const T* d_h;  // [tokens, D]
  T *d_x, *d_g;  // [tokens, D]
  T* d_state;  // [N, D]: of the final state, then of the initial one
};

template <class T>
struct Kernels {
  // Task n * ceil(D / kChannels) + block.
  void (*forward)(const Problem<T>&, int64_t task);
  void (*backward)(const Problem<T>&, const Gradients<T>&, int64_t task);
};

// Data, not functions: reading them runs no instruction of their level.
#define TILEWRIGHT_HGRN_LEVEL(level)    \
  namespace level {                     \
  extern const Kernels<float> kFloat;   \
  extern const Kernels<double> kDouble; \
  }
TILEWRIGHT_HGRN_LEVEL(generic)
TILEWRIGHT_HGRN_LEVEL(avx2)
TILEWRIGHT_HGRN_LEVEL(avx512)
#undef TILEWRIGHT_HGRN_LEVEL

template <class T>
const Kernels<T>& kernels() {
  constexpr bool kIsFloat = sizeof(T) == sizeof(float);
  const auto pick = [](const auto& f, const auto& d) -> const Kernels<T>& {
    if constexpr (kIsFloat) {
      return f;
    } else {
      return d;
    }
  };
#if defined(__x86_64__)
  const isa::Level level = isa::active();
  if (level >= isa::Level::kAvx512) return pick(avx512::kFloat, avx512::kDouble);
  if (level == isa::Level::kAvx2) return pick(avx2::kFloat, avx2::kDouble);
#endif
  return pick(generic::kFloat, generic::kDouble);
}

}  // namespace tilewright::hgrn
