// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_fp8_attention/partials.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

namespace tilewright::int4_fp8_attention {
namespace {

void combine_row(const Problem& p, const Item& item, int64_t row) {
  const int64_t d = p.cache.head_dim;
  float* out = output_row(p, item, row);
  float maximum = -std::numeric_limits<float>::infinity();
  for (int64_t c = 0; c < item.chunks; ++c) maximum = std::max(maximum, partial_of(p, item, c).maximum[row]);
  std::fill(out, out + d, 0.0f);
  float total = 0.0f;
  for (int64_t c = 0; c < item.chunks; ++c) {
    const Partial part = partial_of(p, item, c);
    if (part.maximum[row] == -std::numeric_limits<float>::infinity()) continue;
    const float weight = std::exp2(part.maximum[row] - maximum);
    const float* sums = part.sums + row * d;
    for (int64_t i = 0; i < d; ++i) out[i] += weight * sums[i];
    total += weight * part.total[row];
  }
  if (total == 0.0f) return;
  for (int64_t i = 0; i < d; ++i) out[i] /= total;
}

}  // namespace

Partial partial_of(const Problem& p, const Item& item, int64_t chunk) {
  const int64_t rows = item.rows(p.group());
  auto* base = reinterpret_cast<float*>(p.workspace + item.partials_at + chunk * partial_bytes(rows, p.cache.head_dim));
  float* maximum = base + rows * p.cache.head_dim;
  return {base, maximum, maximum + rows};
}

float* output_row(const Problem& p, const Item& item, int64_t row) {
  const int64_t group = p.group();
  return p.out + (item.first_query + row / group) * p.out_token_stride +
         (item.kv_head * group + row % group) * p.out_head_stride;
}

const float* query_row(const Problem& p, const Item& item, int64_t row) {
  const int64_t group = p.group();
  return p.q + (item.first_query + row / group) * p.q_token_stride +
         (item.kv_head * group + row % group) * p.q_head_stride;
}

void arrive(const Problem& p, const Item& item) {
  auto& counter = *reinterpret_cast<int32_t*>(p.workspace + item.counter_at);
  std::atomic_ref<int32_t> arrived(counter);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < item.chunks) return;
  arrived.store(0, std::memory_order_relaxed);
  for (int64_t row = 0; row < item.rows(p.group()); ++row) combine_row(p, item, row);
}

uint8_t* scratch(int64_t bytes) {
  static thread_local Scratch memory;
  return memory.get<uint8_t>(bytes);
}

}  // namespace tilewright::int4_fp8_attention
