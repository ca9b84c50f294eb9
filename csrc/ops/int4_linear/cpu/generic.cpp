// SPDX-License-Identifier: Apache-2.0
// Plain C++: always present, always correct. The vector levels follow the same order of float operations in the INT8
// path (one multiply-add a group, groups in sequence), so that all levels give the same bits there.
#include <algorithm>
#include <cmath>

#include "format/fp8.h"
#include "ops/int4_linear/activation.h"
#include "ops/int4_linear/kernels.h"

namespace tilewright::int4_linear::generic {
namespace {

using format::Int4;
using format::Int4View;
using format::OffsetKind;

// One group of one row against one token. Columns past K hold code 0 against activation 0.
template <class Code, class Sum>
Sum group_dot(const Int4View& w, int64_t row, const Code* x, int64_t k_first, int64_t k_last, int zero) {
  Sum sum = 0;
  for (int64_t k = k_first; k < k_last; ++k) {
    sum += static_cast<Sum>(static_cast<int>(format::int4_code(w, row, k)) - zero) * static_cast<Sum>(x[k]);
  }
  return sum;
}

float finish(const Problem& p, int64_t n, float sum) {
  const float scaled = sum * (1.0f / p.weight.per_tensor_scale);
  return p.bias != nullptr ? scaled + p.bias[n] : scaled;
}

// Adds the groups up, a run of groups that share an activation scale at a time. add(lane, g, part) is part plus group g.
template <class AddGroup>
float sum_groups(const Problem& p, int64_t m, int64_t n, const AddGroup& add) {
  const Int4View& w = p.weight;
  const float* scales = p.x.scales + m * token_scales(w, p.scale_group);
  float total = 0.0f;
  for (int64_t g = 0; g < w.groups;) {
    const int64_t run = g * w.group / p.scale_group;
    float part = 0.0f;
    for (; g < w.groups && g * w.group / p.scale_group == run; ++g) part = add(format::int4_lane(w, n, g), g, part);
    total = std::fma(scales[run], part, total);
  }
  return finish(p, n, total);
}

float int8_element(const Problem& p, int64_t m, int64_t n) {
  const Int4View& w = p.weight;
  const auto* x = static_cast<const int8_t*>(p.x.codes) + m * w.padded_k();
  const auto* sums = static_cast<const int32_t*>(p.x.group_sums) + m * w.groups;
  return sum_groups(p, m, n, [&](const format::Int4Lane& lane, int64_t g, float part) {
    const int64_t last = std::min(w.k, (g + 1) * w.group);
    const auto dot = group_dot<int8_t, int32_t>(w, n, x, g * w.group, last, lane.zero);
    part = std::fma(lane.scale, static_cast<float>(dot), part);
    const bool minimum = w.offset_kind == OffsetKind::kMinimum;
    return minimum ? std::fma(lane.minimum, static_cast<float>(sums[g]), part) : part;
  });
}

float fp8_element(const Problem& p, int64_t m, int64_t n) {
  const Int4View& w = p.weight;
  const auto* x = static_cast<const uint16_t*>(p.x.codes) + m * w.padded_k();
  const auto* sums = static_cast<const float*>(p.x.group_sums) + m * w.groups;
  return sum_groups(p, m, n, [&](const format::Int4Lane& lane, int64_t g, float part) {
    float dot = 0.0f;
    for (int64_t s = g * w.steps_per_group; s < std::min(w.steps, (g + 1) * w.steps_per_group); ++s) {
      for (int slot = 0; slot < Int4::kColsPerStep; ++slot) {
        const int code = format::int4_code(w, n, s * Int4::kColsPerStep + kPairOrder[slot]) - lane.zero;
        float weight = static_cast<float>(code);
        if (p.mode == Mode::kFold) weight = format::E4M3::round(weight * lane.scale);
        dot = std::fma(weight, format::bf16_to_float(x[s * Int4::kColsPerStep + slot]), dot);
      }
    }
    part = p.mode == Mode::kFold ? part + dot : std::fma(lane.scale, dot, part);
    return w.offset_kind == OffsetKind::kMinimum ? std::fma(lane.minimum, sums[g], part) : part;
  });
}

template <float (*element)(const Problem&, int64_t, int64_t)>
void run(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  const int64_t rows = plan.blocks_per_item * Int4::kRowsPerBlock;
  for (int64_t n = first * rows; n < std::min(p.weight.n, last * rows); ++n) {
    for (int64_t m = 0; m < p.m; ++m) p.y[m * p.y_stride + n] = element(p, m, n);
  }
}

bool all_finite(const float* x, int64_t k) {
  for (int64_t i = 0; i < k; ++i) {
    if (!std::isfinite(x[i])) return false;
  }
  return true;
}

// scales[A] of a token, absmax / limit; true if the token is finite.
bool token_scales(const float* x, const TokenCut& cut, float limit, float* scales) {
  const bool finite = all_finite(x, cut.k);
  for (int64_t first = 0; first < cut.k; first += cut.scale_group) {
    float largest = 0.0f;
    for (int64_t i = first; i < std::min(cut.k, first + cut.scale_group); ++i) {
      largest = std::max(largest, std::fabs(x[i]));
    }
    const float scale = largest / limit;
    *scales++ = !finite ? std::nanf("") : scale == 0.0f ? 1.0f : scale;
  }
  return finite;
}

}  // namespace

void int8_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  run<int8_element>(p, plan, first, last);
}

void fp8_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  run<fp8_element>(p, plan, first, last);
}

void prepare_int8(const float* x, const TokenCut& cut, void* codes, float* scales, void* group_sums) {
  const bool finite = token_scales(x, cut, kInt8Limit, scales);
  auto* out = static_cast<int8_t*>(codes);
  auto* sums = static_cast<int32_t*>(group_sums);
  const int64_t kp = round_up(cut.k, Int4::kColsPerStep);
  std::fill_n(sums, ceil_div(cut.k, cut.group), 0);
  for (int64_t i = 0; i < kp; ++i) {
    const bool used = finite && i < cut.k;
    out[i] = used ? static_cast<int8_t>(std::nearbyint(x[i] / scales[i / cut.scale_group])) : int8_t{0};
    if (used) sums[i / cut.group] += out[i];
  }
}

void prepare_fp8(const float* x, const TokenCut& cut, void* codes, float* scales, void* group_sums) {
  const bool finite = token_scales(x, cut, kFp8Limit, scales);
  auto* out = static_cast<uint16_t*>(codes);
  auto* sums = static_cast<float*>(group_sums);
  const int64_t kp = round_up(cut.k, Int4::kColsPerStep);
  std::fill_n(sums, ceil_div(cut.k, cut.group), 0.0f);
  for (int64_t i = 0; i < kp; ++i) {
    const int64_t source = (i / 8) * 8 + kPairOrder[i % 8];
    const bool used = finite && source < cut.k;
    const float value = used ? format::E4M3::round(x[source] / scales[source / cut.scale_group]) : 0.0f;
    out[i] = format::float_to_bf16(value);   // exact: four significant bits
    if (used) sums[source / cut.group] += value;
  }
}

}  // namespace tilewright::int4_linear::generic
