// SPDX-License-Identifier: Apache-2.0
// HGRN's recurrence on the device: every channel of every sequence is a thread's, token by token. T is float or double;
// every pointer is a device pointer, offsets too.
#pragma once

#include <cstdint>

#include "hopper/stream.h"

namespace tilewright::hgrn::cuda {

template <class T>
struct Problem {
  int64_t sequences, tokens, width;
  const int64_t* offsets;  // [N + 1] of packed sequences; null: sequence n is the n-th `tokens` tokens
  const T *x, *g;  // [.., D]
  const T* initial;  // [N, D]; null: zero
  T* h;  // [.., D]; the backward pass reads it
  T* state;  // [N, D]: the last h
};

template <class T>
struct Gradients {
  const T* d_h;  // [.., D]
  const T* d_state;  // [N, D]
  T *d_x, *d_g;  // [.., D]
  T* d_initial;  // [N, D]
};

template <class T>
void launch_forward(const Problem<T>& problem, hopper::Stream stream);
template <class T>
void launch_backward(const Problem<T>& problem, const Gradients<T>& gradients, hopper::Stream stream);

}  // namespace tilewright::hgrn::cuda
