// SPDX-License-Identifier: Apache-2.0
// Plain C++, in int4_linear's order of float operations: one multiply-add a group, groups in sequence, a run of groups
// that share an activation scale at a time.
#include <cmath>

#include "ops/int4_sparse/kernels.h"

namespace tilewright::int4_sparse::generic {
namespace {

using format::OffsetKind;

struct Lane {
  float scale, minimum;
  int zero;
};

template <class View>
Lane lane_of(const View& w, const uint8_t* scales, const uint8_t* offsets, int64_t index) {
  const float scale = format::load_scale(scales, index, w.scale_type);
  switch (w.offset_kind) {
    case OffsetKind::kMinimum: return {scale, format::load_scale(offsets, index, w.scale_type), 0};
    case OffsetKind::kZeroPoint: return {scale, 0.0f, offsets[index]};
    case OffsetKind::kSymmetric: break;
  }
  return {scale, 0.0f, format::Int4::kSymmetricZero};
}

// lane(g) and dot(g), the sum of codes times activations, for every group.
template <class View, class LaneOf, class Dot>
float sum_groups(const View& w, const Activation& x, const LaneOf& lane, const Dot& dot) {
  float total = 0.0f;
  for (int64_t g = 0; g < w.groups;) {
    const int64_t run = g * w.group / x.scale_group;
    float part = 0.0f;
    for (; g < w.groups && g * w.group / x.scale_group == run; ++g) {
      const Lane l = lane(g);
      part = std::fma(l.scale, static_cast<float>(dot(g) - l.zero * x.sums[g]), part);
      if (w.offset_kind == OffsetKind::kMinimum) part = std::fma(l.minimum, static_cast<float>(x.sums[g]), part);
    }
    total = std::fma(x.scales[run], part, total);
  }
  return total * (1.0f / w.per_tensor_scale);
}

}  // namespace

void rows(const format::Int4RowsView& w, const Activation& x, const int32_t* rows, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* row = w.row(rows[i]);
    out[i] = sum_groups(
        w, x, [&](int64_t g) { return lane_of(w, row + w.scales_at, row + w.offsets_at, g); },
        [&](int64_t g) {
          int32_t sum = 0;
          for (int64_t k = g * w.group; k < std::min(w.k, (g + 1) * w.group); ++k) {
            sum += format::int4_rows_code(w, rows[i], k) * x.codes[k];
          }
          return sum;
        });
  }
}

void columns(const format::Int4ColumnsView& w, const Activation& x, const Listed& listed, int64_t first, int64_t last,
             float* y, float*) {
  for (int64_t n = first; n < last; ++n) {
    y[n - first] = sum_groups(
        w, x, [&](int64_t g) { return lane_of(w, w.block(g), w.block(g) + w.offsets_at, n); },
        [&](int64_t g) {
          int32_t sum = 0;
          for (int32_t i = listed.starts[g]; i < listed.starts[g + 1]; ++i) {
            const int64_t k = listed.inputs[i];
            sum += format::int4_columns_code(w, n, k) * x.codes[k];
          }
          return sum;
        });
  }
}

}  // namespace tilewright::int4_sparse::generic
