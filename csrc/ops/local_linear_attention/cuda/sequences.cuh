// SPDX-License-Identifier: Apache-2.0
// Which sequence a row belongs to and which keys it sees.
#pragma once

#include "hopper/arithmetic.h"
#include "hopper/hopper.h"
#include "ops/local_linear_attention/cuda/launch.h"

namespace tilewright::local_linear_attention::cuda {

TILEWRIGHT_DEVICE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Offsets that fall or lead outside cannot be refused on the host, which does not see them: they are clamped, so that no
// address leaves the tensors.
TILEWRIGHT_DEVICE Segment segment(const Sequences& s, int64_t index) {
  if (s.offsets != nullptr) {
    const int64_t first = clamp(s.offsets[index], 0, s.rows);
    const int64_t count = clamp(s.offsets[index + 1], first, s.rows) - first;
    return {first, count, first, count};
  }
  const int64_t held = s.lengths == nullptr ? s.keys : clamp(s.lengths[index], 0, s.keys);
  return {index * s.queries, s.queries, index * s.keys, held};
}

// The sequence that holds a row of q; -1 behind the last one.
TILEWRIGHT_DEVICE int64_t sequence_of_row(const Sequences& s, int64_t row) {
  if (s.offsets == nullptr) return row / s.queries;
  if (s.count == 0 || row >= s.offsets[s.count]) return -1;
  int64_t low = 0, high = s.count;  // offsets[low] <= row < offsets[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (s.offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The sequence that holds a row of k. Of equal-sized sequences also the rows that a cache does not fill yet.
TILEWRIGHT_DEVICE int64_t sequence_of_key(const Sequences& s, int64_t row) {
  return s.offsets == nullptr ? row / s.keys : sequence_of_row(s, row);
}

struct Range {
  int64_t begin, end;

  TILEWRIGHT_DEVICE int64_t size() const { return end > begin ? end - begin : 0; }
};

// Keys of the segment that its query sees.
TILEWRIGHT_DEVICE Range visible_keys(const Options& o, const Segment& s, int64_t query) {
  const int64_t position = s.keys - s.queries + query;
  const int64_t begin = o.window > position ? 0 : position - o.window + 1;
  const int64_t end = o.causal && position + 1 < s.keys ? position + 1 : s.keys;
  return {begin, end};
}

// Queries of the segment that see its key.
TILEWRIGHT_DEVICE Range seeing_queries(const Options& o, const Segment& s, int64_t key) {
  const int64_t shift = s.keys - s.queries;
  const int64_t begin = o.causal && key > shift ? key - shift : 0;
  const int64_t end = o.window < s.queries + shift - key ? key - shift + o.window : s.queries;
  return {begin, end};
}

}  // namespace tilewright::local_linear_attention::cuda
