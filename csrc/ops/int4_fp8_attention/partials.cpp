// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_fp8_attention/partials.h"

#include <atomic>

namespace tilewright::int4_fp8_attention {
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

bool last_to_arrive(const Problem& p, const Item& item) {
  auto& counter = *reinterpret_cast<int32_t*>(p.workspace + item.counter_at);
  std::atomic_ref<int32_t> arrived(counter);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < item.chunks) return false;
  arrived.store(0, std::memory_order_relaxed);
  return true;
}

uint8_t* scratch(int64_t bytes) {
  static thread_local Scratch memory;
  return memory.get<uint8_t>(bytes);
}

}  // namespace tilewright::int4_fp8_attention
