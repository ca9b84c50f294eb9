// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/lanes.h.
#include <cmath>

#include "isa/lanes.h"
#include "ops/rms_norm/kernels.h"

namespace tilewright::rms_norm::TILEWRIGHT_LEVEL {

void normalize(const float* x, const float* weight, int64_t n, float eps, float* y) {
  const int64_t whole = n - n % kLanes;
  const int64_t tail = n - whole;
  Lanes sums = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Lanes v = load_lanes(x + i);
    sums += v * v;
  }
  const Lanes last = tail == 0 ? Lanes{} : load_first_lanes(x + whole, tail);
  sums += last * last;
  const float inverse = 1.0f / std::sqrt(sum_lanes(sums) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < whole; i += kLanes) {
    store_lanes(y + i, load_lanes(weight + i) * (load_lanes(x + i) * inverse));
  }
  if (tail == 0) return;
  store_first_lanes(y + whole, load_first_lanes(weight + whole, tail) * (last * inverse), tail);
}

}  // namespace tilewright::rms_norm::TILEWRIGHT_LEVEL
