// SPDX-License-Identifier: Apache-2.0
// The results of one chunk of keys, and how the chunks of a block of queries become its output.
#pragma once

#include <cstdint>

#include "ops/int4_fp8_attention/plan.h"

namespace tilewright::int4_fp8_attention {

// Of one chunk: sums[rows][D] of 2^(x - maximum) v, then maximum[rows] and total[rows] (the sum of 2^(x - maximum)),
// x being a score in base-2 units. A row that sees no key of the chunk has maximum -inf and zeros.
struct Partial {
  float* sums;
  float* maximum;
  float* total;
};

inline int64_t partial_bytes(int64_t rows, int64_t head_dim) {
  return round_up(rows * (head_dim + 2) * static_cast<int64_t>(sizeof(float)), kCacheLine);
}

// Row r of an item is query r / group, head r % group of the KV head's group.
Partial partial_of(const Problem& problem, const Item& item, int64_t chunk);
float* output_row(const Problem& problem, const Item& item, int64_t row);
const float* query_row(const Problem& problem, const Item& item, int64_t row);

// To be called once an item's partial is written. The last chunk to arrive combines all of them, in order of the keys.
void arrive(const Problem& problem, const Item& item);

// Memory of the calling thread: grows, never shrinks.
uint8_t* scratch(int64_t bytes);

}  // namespace tilewright::int4_fp8_attention
