// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/lanes.h.
#include "isa/lanes.h"
#include "ops/gated_activation/kernels.h"

namespace tilewright::gated_activation::TILEWRIGHT_LEVEL {
namespace {

TILEWRIGHT_INLINE Lanes silu(const Lanes& gate, const Lanes& up) { return gate / (1.0f + exp_lanes(-gate)) * up; }

// A NaN is not below zero and stays.
TILEWRIGHT_INLINE Lanes squared_relu(const Lanes& gate, const Lanes& up) {
  const Lanes positive = gate < 0.0f ? Lanes{} : gate;
  return positive * positive * up;
}

template <Lanes (*kFunction)(const Lanes&, const Lanes&)>
TILEWRIGHT_INLINE void multiply(const float* gate, const float* up, int64_t n, float* y) {
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store_lanes(y + i, kFunction(load_lanes(gate + i), load_lanes(up + i)));
  const int64_t tail = n - whole;
  if (tail == 0) return;
  store_first_lanes(y + whole, kFunction(load_first_lanes(gate + whole, tail), load_first_lanes(up + whole, tail)),
                    tail);
}

}  // namespace

void silu_multiply(const float* gate, const float* up, int64_t n, float* y) { multiply<silu>(gate, up, n, y); }

void squared_relu_multiply(const float* gate, const float* up, int64_t n, float* y) {
  multiply<squared_relu>(gate, up, n, y);
}

}  // namespace tilewright::gated_activation::TILEWRIGHT_LEVEL
