// SPDX-License-Identifier: Apache-2.0
// Attention for whatever the fast kernels do not take: any head size, alignment and type. One warp has one row (a query
// of one head): lanes hold 32 keys for the scores, then elements of the head for the sums. Everything in float32.
#pragma once

#include "ops/int4_fp8_attention/cuda/rows.cuh"

namespace tilewright::int4_fp8_attention::cuda {

inline constexpr int kPlainWarps = 4;
inline constexpr int kLaneElements = static_cast<int>(kMaxHeadDim) / kWarp;
inline constexpr int kPlainSharedBytes = kPlainWarps * static_cast<int>(kMaxHeadDim) * 4;

// Element d of a cached row, without its scale.
TILEWRIGHT_DEVICE float cached(const Cache& c, const uint8_t* row, int d) {
  if (c.format == CacheFormat::kBFloat16) return hopper::to_float(reinterpret_cast<const bf16*>(row)[d]);
  const int byte = row[d / 2];
  return static_cast<float>((d % 2 == 0 ? byte & 15 : byte >> 4) - format::Int4Kv::kZero);
}

// The row's query into shared memory; returns the factor of its scores.
TILEWRIGHT_DEVICE float load_query(const Attention& p, int64_t t, int64_t h, float* q) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, head_dim = static_cast<int>(p.cache.head_dim);
  uint32_t largest = 0;
  for (int d = lane; d < head_dim; d += kWarp) {
    q[d] = query_element(p, t, h, d);
    const uint32_t bits = magnitude_bits(q[d]);
    largest = bits > largest ? bits : largest;
  }
  float factor = 1.0f;
  if (p.query == Query::kFp8) {
    const QueryScale scale = fp8_query_scale(warp_max(largest));
    factor = scale.scale;
    for (int d = lane; d < head_dim; d += kWarp) {
      q[d] = hopper::to_float(hopper::from_float<hopper::e4m3>(fp8_query(q[d], scale)));
    }
  }
  __syncwarp();
  return score_factor(p, factor);
}

// q times one cached key, its scales included.
TILEWRIGHT_DEVICE float key_product(const Cache& c, const float* q, const uint8_t* row, int64_t scale_at) {
  const int head_dim = static_cast<int>(c.head_dim);
  const bool int4 = c.format == CacheFormat::kInt4;
  float result = 0.0f;
  for (int first = 0, group = 0; first < head_dim; first += format::Int4Kv::kGroup, ++group) {
    const int end = first + format::Int4Kv::kGroup < head_dim ? first + format::Int4Kv::kGroup : head_dim;
    float sum = 0.0f;
    for (int d = first; d < end; ++d) sum = fmaf(q[d], cached(c, row, d), sum);
    result += int4 ? sum * cache_scale(c, c.k_scales, scale_at, group) : sum;
  }
  return result;
}

// What the lane's key contributes with: its weight times the scale of each group of its value. A bfloat16 value with an
// element that is not finite counts as NaN throughout.
TILEWRIGHT_DEVICE void value_weights(const Cache& c, float weight, const uint8_t* row, int64_t scale_at,
                                     float (&weights)[kMaxGroups]) {
  const int head_dim = static_cast<int>(c.head_dim);
  if (c.format == CacheFormat::kInt4) {
    for (int g = 0; g < kMaxGroups; ++g) {
      weights[g] = g * format::Int4Kv::kGroup < head_dim ? weight * cache_scale(c, c.v_scales, scale_at, g) : 0.0f;
    }
    return;
  }
  for (int d = 0; d < head_dim; ++d) {
    if (magnitude_bits(cached(c, row, d)) >= kInfinity) weight = not_a_number();
  }
  for (float& w : weights) w = weight;
}

struct PlainRow {
  float maximum, total;
  float sums[kLaneElements];  // of elements lane, lane + 32, ...
};

// 32 keys, of which the first `count` are there; the lane's key is `key`.
TILEWRIGHT_DEVICE void plain_tile(const Attention& p, int64_t data, int64_t scales, int64_t first, int count,
                                  const float* q, float factor, PlainRow& row) {
  const Cache& c = p.cache;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, head_dim = static_cast<int>(c.head_dim);
  const bool present = lane < count;
  const int64_t key = first + lane;
  float score = lowest();
  if (present) {
    score = key_product(c, q, c.k + data + key * c.data.token, scales + key * c.scales.token) * factor;
  }
  const float maximum = fmaxf(row.maximum, warp_max(score));
  const float shift = maximum == lowest() ? 0.0f : maximum;
  const float correction = exp2f(row.maximum - shift);
  const float weight = present ? exp2f(score - shift) : 0.0f;
  float weights[kMaxGroups] = {};
  if (present) {
    value_weights(c, weight, c.v + data + key * c.data.token, scales + key * c.scales.token, weights);
  }
  row.maximum = maximum;
  row.total = row.total * correction + weight;
  for (float& sum : row.sums) sum *= correction;
  for (int j = 0; j < count; ++j) {
    const uint8_t* value = c.v + data + (first + j) * c.data.token;
    float scaled[kMaxGroups];
    for (int g = 0; g < kMaxGroups; ++g) scaled[g] = __shfl_sync(kAllLanes, weights[g], j);
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const int d = lane + kWarp * i;
      if (d < head_dim)
        row.sums[i] = fmaf(scaled[kWarp * i / format::Int4Kv::kGroup], cached(c, value, d), row.sums[i]);
    }
  }
}

TILEWRIGHT_DEVICE void plain_row(const Attention& p, int t, int h, float* q) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int s = sequence_with(p.cu_seqlens, p.sequences, t);
  const Sequence sequence = sequence_at(p, s);
  const int kv_head = h / p.group();
  PlainRow row{lowest(), 0.0f, {}};
  if (sequence.valid()) {
    const float factor = load_query(p, t, h, q);
    const Seen seen = seen_by(p, sequence, t - sequence.first);
    const int64_t data = data_at(p.cache, s, kv_head), scales = scales_at(p.cache, s, kv_head);
    for (int first = seen.begin; first < seen.end; first += kWarp) {
      plain_tile(p, data, scales, first, smaller(kWarp, seen.end - first), q, factor, row);
    }
  }
  const float total = warp_sum(row.total);
  const float normalizer = sequence.valid() ? (total == 0.0f ? 0.0f : 1.0f / total) : not_a_number();
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const int d = lane + kWarp * i;
    if (d < p.cache.head_dim) set_element(p.out, p.q.type, out_row(p, t, h) + d, row.sums[i] * normalizer);
  }
}

__global__ void __launch_bounds__(kPlainWarps* kWarp) plain_attention(const __grid_constant__ Attention p) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  auto* q = reinterpret_cast<float*>(hopper::shared_memory()) + warp * static_cast<int>(kMaxHeadDim);
  clear_tail(p);
  const int row = static_cast<int>(blockIdx.x) * kPlainWarps + warp, heads = static_cast<int>(p.heads);
  const int t = row / heads;
  if (t < smaller(p.tokens, p.cu_seqlens[p.sequences])) plain_row(p, t, row % heads, q);
}

}  // namespace tilewright::int4_fp8_attention::cuda
