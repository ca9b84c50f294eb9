// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/lanes.h. Each operation rounds by itself, as in a graph of tensor operators.
#include "isa/lanes.h"
#include "ops/activation_map/kernels.h"

namespace tilewright::activation_map::TILEWRIGHT_LEVEL {
namespace {

TILEWRIGHT_INLINE Lanes mapped(const Lanes& x, const Lanes& w, const Lanes& b, float s) {
  return x * ((w - 1.0f) * s + 1.0f) + b * s;
}

}  // namespace

void apply(const Problem& p, const float* x, float* y) {
  const int64_t whole = p.width - p.width % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Lanes t = mapped(load_lanes(x + i), load_lanes(p.weight + i), load_lanes(p.bias + i), p.strength);
    store_lanes(y + i, p.add ? load_lanes(y + i) + t : t);
  }
  const int64_t tail = p.width - whole;
  if (tail == 0) return;
  const Lanes t = mapped(load_first_lanes(x + whole, tail), load_first_lanes(p.weight + whole, tail),
                         load_first_lanes(p.bias + whole, tail), p.strength);
  store_first_lanes(y + whole, p.add ? load_first_lanes(y + whole, tail) + t : t, tail);
}

}  // namespace tilewright::activation_map::TILEWRIGHT_LEVEL
