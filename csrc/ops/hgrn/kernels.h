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

#define TILEWRIGHT_HGRN_LEVEL(level)       \
  namespace level {                        \
  template <class T>                       \
  Kernels<T> table();                      \
  extern template Kernels<float> table();  \
  extern template Kernels<double> table(); \
  }
TILEWRIGHT_HGRN_LEVEL(generic)
TILEWRIGHT_HGRN_LEVEL(avx2)
TILEWRIGHT_HGRN_LEVEL(avx512)
#undef TILEWRIGHT_HGRN_LEVEL

template <class T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  static const isa::Table<Kernels<T>> table{
      {generic::table<T>(), avx2::table<T>(), avx512::table<T>(), avx512::table<T>()}};
  return table.entries[static_cast<int>(isa::active())];
#else
  static const Kernels<T> only = generic::table<T>();
  return only;
#endif
}

}  // namespace tilewright::hgrn
