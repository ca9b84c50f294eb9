// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/simd.h. One pass over the tokens; the running state of a vector of channels sits in a
// register-sized row that stays in the first-level cache.
#pragma once

#include <algorithm>

#include "core/memory.h"
#include "isa/simd.h"
#include "ops/hgrn/kernels.h"

namespace tilewright::hgrn {
namespace {

template <class T>
struct Block {
  int64_t sequence, first, last;   // channels

  Block(const Problem<T>& p, int64_t task) {
    const int64_t blocks = ceil_div(p.width, kChannels);
    sequence = task / blocks;
    first = task % blocks * kChannels;
    last = std::min(first + kChannels, p.width);
  }
};

template <class T>
void forward(const Problem<T>& p, int64_t task) {
  using S = Simd<T>;
  const Block<T> block(p, task);
  T* state = p.state + block.sequence * p.width;
  for (int64_t t = p.offsets[block.sequence]; t < p.offsets[block.sequence + 1]; ++t) {
    for (int64_t c = block.first; c < block.last; c += S::kLanes) {
      const int64_t at = t * p.width + c, n = block.last - c;
      const auto decay = exp(S::load_first(p.g + at, n));
      const auto h = S::fma(decay, S::load_first(state + c, n), S::load_first(p.x + at, n));
      S::store_first(p.h + at, h, n);
      S::store_first(state + c, h, n);
    }
  }
}

// dx_t = dh_t, dg_t = dh_t exp(g_t) h_{t-1}, dh_{t-1} += exp(g_t) dh_t.
template <class T>
void backward(const Problem<T>& p, const Gradients<T>& gradients, int64_t task) {
  using S = Simd<T>;
  const Block<T> block(p, task);
  const int64_t first = p.offsets[block.sequence];
  T* carried = gradients.d_state + block.sequence * p.width;
  for (int64_t t = p.offsets[block.sequence + 1] - 1; t >= first; --t) {
    const T* before = t == first ? gradients.initial + block.sequence * p.width : p.h + (t - 1) * p.width;
    for (int64_t c = block.first; c < block.last; c += S::kLanes) {
      const int64_t at = t * p.width + c, n = block.last - c;
      const auto d_h = S::add(S::load_first(gradients.d_h + at, n), S::load_first(carried + c, n));
      const auto d_before = S::mul(exp(S::load_first(p.g + at, n)), d_h);
      S::store_first(gradients.d_x + at, d_h, n);
      S::store_first(gradients.d_g + at, S::mul(d_before, S::load_first(before + c, n)), n);
      S::store_first(carried + c, d_before, n);
    }
  }
}

}  // namespace

namespace TILEWRIGHT_LEVEL {

const Kernels<float> kFloat{forward<float>, backward<float>};
const Kernels<double> kDouble{forward<double>, backward<double>};

}  // namespace TILEWRIGHT_LEVEL
}  // namespace tilewright::hgrn
