// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/lanes.h.
#include "isa/lanes.h"
#include "ops/gated_activation/kernels.h"

namespace tilewright::gated_activation::TILEWRIGHT_LEVEL {
namespace {

TILEWRIGHT_INLINE Lanes apply(const Lanes& gate, const Lanes& up) { return gate / (1.0f + exp_lanes(-gate)) * up; }

}  // namespace

void silu_multiply(const float* gate, const float* up, int64_t n, float* y) {
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store_lanes(y + i, apply(load_lanes(gate + i), load_lanes(up + i)));
  const int64_t tail = n - whole;
  if (tail == 0) return;
  store_first_lanes(y + whole, apply(load_first_lanes(gate + whole, tail), load_first_lanes(up + whole, tail)), tail);
}

}  // namespace tilewright::gated_activation::TILEWRIGHT_LEVEL
