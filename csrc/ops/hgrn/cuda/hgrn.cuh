// SPDX-License-Identifier: Apache-2.0
// h_t = exp(g_t) h_{t-1} + x_t and its gradient, from c_t = dh_t + exp(g_{t+1}) c_{t+1}:
//
//   dx_t = c_t          dg_t = c_t exp(g_t) h_{t-1}          dh_0 = exp(g_1) c_1
//
// Loads of kAhead tokens are under way at a time: they do not wait for the recurrence.
#pragma once

#include "hopper/hopper.h"
#include "ops/hgrn/cuda/launch.h"

namespace tilewright::hgrn::cuda {

inline constexpr int kThreads = 128;
inline constexpr int kAhead = 8;

TILEWRIGHT_DEVICE float exponential(float x) { return expf(x); }
TILEWRIGHT_DEVICE double exponential(double x) { return exp(x); }

// A thread's channel of tokens [first, last), which lie one after the other.
struct Channel {
  int64_t sequence, channel, first, last, end;  // end: of the rows that this thread also clears
  bool inside;
};

template <class T>
TILEWRIGHT_DEVICE Channel channel_of(const Problem<T>& p) {
  Channel at{};
  at.sequence = static_cast<int64_t>(blockIdx.x);
  at.channel = static_cast<int64_t>(blockIdx.y) * kThreads + static_cast<int64_t>(threadIdx.x);
  at.inside = at.channel < p.width;
  if (p.offsets == nullptr) {
    at.first = at.sequence * p.tokens;
    at.last = at.end = at.first + p.tokens;
    return at;
  }
  // Offsets that fall or pass the last token are cut off.
  const int64_t first = p.offsets[at.sequence], last = p.offsets[at.sequence + 1];
  at.first = first < 0 ? 0 : first > p.tokens ? p.tokens : first;
  at.last = last < at.first ? at.first : last > p.tokens ? p.tokens : last;
  at.end = at.sequence == p.sequences - 1 ? p.tokens : at.last;
  return at;
}

template <class T>
struct ForwardParams {
  Problem<T> problem;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ ForwardParams<T> params) {
  const Problem<T>& p = params.problem;
  const Channel at = channel_of(p);
  if (!at.inside) return;
  const int64_t where = at.sequence * p.width + at.channel;
  T h = p.initial == nullptr ? T{0} : p.initial[where];
  for (int64_t t = at.first; t < at.last; t += kAhead) {
    T x[kAhead], g[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = (t + i) * p.width + at.channel;
      const bool here = t + i < at.last;
      x[i] = here ? p.x[row] : T{0};
      g[i] = here ? p.g[row] : T{0};
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (t + i >= at.last) continue;
      h = exponential(g[i]) * h + x[i];
      p.h[(t + i) * p.width + at.channel] = h;
    }
  }
  p.state[where] = h;
  for (int64_t t = at.last; t < at.end; ++t) p.h[t * p.width + at.channel] = T{0};
}

template <class T>
struct BackwardParams {
  Problem<T> problem;
  Gradients<T> gradients;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ BackwardParams<T> params) {
  const Problem<T>& p = params.problem;
  const Gradients<T>& d = params.gradients;
  const Channel at = channel_of(p);
  if (!at.inside) return;
  const int64_t where = at.sequence * p.width + at.channel;
  const T initial = p.initial == nullptr ? T{0} : p.initial[where];
  T carried = d.d_state[where];
  for (int64_t t = at.last - 1; t >= at.first; t -= kAhead) {
    T dh[kAhead], g[kAhead], before[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = (t - i) * p.width + at.channel;
      const bool here = t - i >= at.first;
      dh[i] = here ? d.d_h[row] : T{0};
      g[i] = here ? p.g[row] : T{0};
      before[i] = t - i > at.first ? p.h[row - p.width] : initial;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (t - i < at.first) continue;
      const int64_t row = (t - i) * p.width + at.channel;
      const T total = dh[i] + carried;
      carried = exponential(g[i]) * total;
      d.d_x[row] = total;
      d.d_g[row] = carried * before[i];
    }
  }
  d.d_initial[where] = carried;
  for (int64_t t = at.last; t < at.end; ++t) {
    d.d_x[t * p.width + at.channel] = T{0};
    d.d_g[t * p.width + at.channel] = T{0};
  }
}

}  // namespace tilewright::hgrn::cuda
