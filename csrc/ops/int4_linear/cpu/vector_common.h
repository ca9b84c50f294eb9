// SPDX-License-Identifier: Apache-2.0
// What the vector kernels share: picking the instantiation for a weight, group scaling, and the last step of an output.
#pragma once

#include <algorithm>
#include <type_traits>

#include "ops/int4_linear/kernels.h"

namespace tilewright::int4_linear {
namespace {

using format::Int4;
using format::Int4View;
using format::OffsetKind;
using format::ScaleType;

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// Calls use(scale type, offset kind) with both as compile-time constants.
template <class Use>
void with_format(const Int4View& w, const Use& use) {
  const auto with_scale = [&](auto scale) {
    switch (w.offset_kind) {
      case OffsetKind::kSymmetric: return use(scale, Constant<OffsetKind::kSymmetric>{});
      case OffsetKind::kMinimum: return use(scale, Constant<OffsetKind::kMinimum>{});
      case OffsetKind::kZeroPoint: return use(scale, Constant<OffsetKind::kZeroPoint>{});
    }
  };
  switch (w.scale_type) {
    case ScaleType::kFloat16: return with_scale(Constant<ScaleType::kFloat16>{});
    case ScaleType::kBFloat16: return with_scale(Constant<ScaleType::kBFloat16>{});
    case ScaleType::kFloat32: return with_scale(Constant<ScaleType::kFloat32>{});
  }
}

// Calls tile(m, constant) over all tokens in tiles of kMost, then once for the rest.
template <int kMost, class Tile>
void each_token_tile(int64_t tokens, const Tile& tile) {
  int64_t m = 0;
  for (; m + kMost <= tokens; m += kMost) tile(m, Constant<kMost>{});
  const auto rest = [&](auto& self, auto size) -> void {
    if constexpr (size.value > 0) {
      if (tokens - m == size.value) return tile(m, size);
      self(self, Constant<size.value - 1>{});
    }
  };
  rest(rest, Constant<kMost - 1>{});
}

// y[m, n .. n+lanes) = total * scale (+ bias), rows past N left alone.
template <class V>
void finish(const Problem& p, int64_t m, int64_t n, typename V::F total) {
  const int64_t rows = p.weight.n - n;
  if (rows <= 0) return;
  auto y = V::mul(total, V::set1(p.x.scales[m] / p.weight.per_tensor_scale));
  if (p.bias != nullptr) y = V::add(y, V::load_first(p.bias + n, rows));
  V::store_first(p.y + m * p.y_stride + n, y, rows);
}

inline int64_t group_steps(const Int4View& w, int64_t g) {
  return std::min(w.steps_per_group, w.steps - g * w.steps_per_group);
}

}  // namespace
}  // namespace tilewright::int4_linear
