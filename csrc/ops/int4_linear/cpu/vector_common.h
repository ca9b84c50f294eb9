// SPDX-License-Identifier: Apache-2.0
// What the vector kernels share: picking the instantiation for a weight, group scaling, and the last step of an output.
#pragma once

#include <immintrin.h>

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

// y[m, n .. n+lanes) = total / p (+ bias), rows past N left alone.
template <class V>
void finish(const Problem& p, int64_t m, int64_t n, typename V::F total) {
  const int64_t rows = p.weight.n - n;
  if (rows <= 0) return;
  auto y = V::mul(total, V::set1(1.0f / p.weight.per_tensor_scale));
  if (p.bias != nullptr) y = V::add(y, V::load_first(p.bias + n, rows));
  V::store_first(p.y + m * p.y_stride + n, y, rows);
}

// Weights are one forward stream; asked for a little ahead of the hardware prefetcher, which stops at each page.
constexpr int64_t kPrefetchBytes = 1024;

inline void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

// Adds up a tile's groups, a run of groups that share an activation scale at a time: add_group(g) adds group g to the
// parts, end_run(scale(t)) moves the parts to the totals and clears them.
template <class AddGroup, class EndRun>
inline __attribute__((always_inline)) void each_run(const Problem& p, int64_t m, const AddGroup& add_group,
                                                    const EndRun& end_run) {
  const int64_t groups = p.weight.groups;
  const int64_t groups_per_run = std::max<int64_t>(1, std::min(p.scale_group, p.weight.k) / p.weight.group);
  const int64_t runs = token_scales(p.weight, p.scale_group);
  const float* scales = p.x.scales + m * runs;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t last = run + 1 == runs ? groups : (run + 1) * groups_per_run;
    for (int64_t g = run * groups_per_run; g < last; ++g) add_group(g);
    end_run([&](int t) { return scales[t * runs + run]; });
  }
}

}  // namespace
}  // namespace tilewright::int4_linear
