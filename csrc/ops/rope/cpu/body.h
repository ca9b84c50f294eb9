// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/lanes.h.
#include "isa/lanes.h"
#include "ops/rope/kernels.h"

namespace tilewright::rope::TILEWRIGHT_LEVEL {
namespace {

template <class Value, class Load, class Store>
TILEWRIGHT_INLINE void turn(const Problem& p, float* low, float* high, const float* scales, int64_t c, const Load& load,
                            const Store& store) {
  const Value cosine = load(p.cosines + c), sine = load(p.sines + c);
  const Value a = load(low + c), b = load(high + c);
  Value first = a * cosine - b * sine;
  Value second = b * cosine + a * sine;
  if (scales != nullptr) {
    first = first * load(scales + c);
    second = second * load(scales + p.head_dim / 2 + c);
  }
  store(low + c, first);
  store(high + c, second);
}

}  // namespace

void rotate(const Problem& p) {
  const int64_t half = p.head_dim / 2;
  for (int64_t h = 0; h < p.heads; ++h) {
    float* low = p.x + h * p.head_dim;
    float* high = low + half;
    const float* scales = p.scales == nullptr ? nullptr : p.scales + (h / p.heads_per_scale) * p.head_dim;
    int64_t c = 0;
    for (; c + kLanes <= half; c += kLanes) turn<Lanes>(p, low, high, scales, c, load_lanes, store_lanes);
    for (; c < half; ++c) {
      turn<float>(
          p, low, high, scales, c, [](const float* at) { return *at; }, [](float* at, float value) { *at = value; });
    }
  }
}

}  // namespace tilewright::rope::TILEWRIGHT_LEVEL
