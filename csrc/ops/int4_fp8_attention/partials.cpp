// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_fp8_attention/partials.h"

#include <algorithm>
#include <atomic>

namespace tilewright::int4_fp8_attention {
namespace {

struct Baseline;

void combine_row(const Problem& p, const Item& item, int64_t row) {
  const int64_t d = p.cache.head_dim;
  float* out = output_row(p, item, row);
  std::fill(out, out + d, 0.0f);
  Folded<Baseline> folded;
  for (int64_t c = 0; c < item.chunks; ++c) {
    const Partial part = partial_of(p, item, c);
    folded.add(d, part.sums + row * d, part.maximum[row], part.total[row], out);
  }
  const float normalizer = folded.normalizer();
  for (int64_t i = 0; i < d; ++i) out[i] *= normalizer;
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
