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

// A row's chunks so far. Whether an item walks over several chunks itself or items for one chunk each are combined
// afterwards, chunks are folded in the order of their keys with these operations: a query's result depends on its keys,
// not on how many queries come with it. Level is a type of the including file, so that no two levels share the code; it
// gives exp2_of(float).
template <class Level>
struct Folded {
  float maximum = 0.0f;
  float total = 0.0f;   // 0: no key seen yet

  // sums[n]: of the chunk; out[n]: of all chunks so far.
  void add(int64_t n, const float* sums, float chunk_maximum, float chunk_total, float* out) {
    if (chunk_total == 0.0f) return;
    if (total == 0.0f) {
      for (int64_t i = 0; i < n; ++i) out[i] = sums[i];
      maximum = chunk_maximum;
      total = chunk_total;
      return;
    }
    const float largest = maximum > chunk_maximum ? maximum : chunk_maximum;
    const float before = Level::exp2_of(maximum - largest);
    const float now = Level::exp2_of(chunk_maximum - largest);
    for (int64_t i = 0; i < n; ++i) out[i] = out[i] * before + sums[i] * now;
    maximum = largest;
    total = total * before + chunk_total * now;
  }
  float normalizer() const { return total == 0.0f ? 0.0f : 1.0f / total; }
};

// Row r of an item is query r / group, head r % group of the KV head's group.
Partial partial_of(const Problem& problem, const Item& item, int64_t chunk);
float* output_row(const Problem& problem, const Item& item, int64_t row);
const float* query_row(const Problem& problem, const Item& item, int64_t row);

// Whether this was the last chunk of its block to arrive; the workspace is then ready for the next run.
bool last_to_arrive(const Problem& problem, const Item& item);

template <class Level>
void combine_row(const Problem& p, const Item& item, int64_t row) {
  const int64_t d = p.cache.head_dim;
  float* out = output_row(p, item, row);
  for (int64_t i = 0; i < d; ++i) out[i] = 0.0f;
  Folded<Level> folded;
  for (int64_t c = 0; c < item.chunks; ++c) {
    const Partial part = partial_of(p, item, c);
    folded.add(d, part.sums + row * d, part.maximum[row], part.total[row], out);
  }
  const float normalizer = folded.normalizer();
  for (int64_t i = 0; i < d; ++i) out[i] *= normalizer;
}

// To be called once an item's partial is written: the last chunk to arrive combines all of them.
template <class Level>
void arrive(const Problem& p, const Item& item) {
  if (!last_to_arrive(p, item)) return;
  for (int64_t row = 0; row < item.rows(p.group()); ++row) combine_row<Level>(p, item, row);
}

// Memory of the calling thread: grows, never shrinks.
uint8_t* scratch(int64_t bytes);

}  // namespace tilewright::int4_fp8_attention
