// SPDX-License-Identifier: Apache-2.0
// The sizes that the vector levels derive from a problem, once for each run of items.
#pragma once

#include <cstdint>

#include "ops/int4_fp8_attention/plan.h"

namespace tilewright::int4_fp8_attention {

// A panel holds one tile of K or V, decoded, as 4-byte units: two bfloat16 that meet in one dot-product lane, or one
// float. Cached rows are read as 4-byte words for K (8 codes or 2 bfloat16) and in vectors of kLanes for V.
//
// Order of K along the depth: INT4 word c gives float units d = 8c .. 8c+7, or pair units (8c+j, 8c+4+j), j = 0..3;
//                             a bfloat16 word gives its two elements in order.
// Order of V across vectors:  INT4 vector 4b+j, lane i is d = 4 (b kLanes + i) + j, so that one shift of 16 codes gives
//                             one vector; bfloat16 vector n, lane i is d = n kLanes + i.
struct Shape {
  CacheFormat format;
  int64_t head_dim;          // D
  int64_t heads_per_group;   // query heads of a KV head
  int64_t row_bytes;
  int64_t words;             // 4-byte words of a K row, tail included
  int64_t units_per_word;
  int64_t key_depth;         // units of a K row
  int64_t scale_groups;      // scales of a row; 1 for bfloat16, where they are 1
  int64_t group_depth;       // K units under one scale
  int64_t value_vectors;     // vectors of a V row
  int64_t group_vectors;     // of them under one scale
  int64_t query_terms;       // 2: a float query as the sum of two bfloat16

  bool int4() const { return format == CacheFormat::kInt4; }
};

inline constexpr int64_t kWordsPerStep = 8;    // of K, decoded together
inline constexpr int64_t kCodesPerLane = 4;    // of V: one 16-bit lane

template <class Isa>
Shape shape_of(const Problem& p) {
  constexpr int64_t kCodesPerWord = 8, kHalvesPerWord = 2;
  Shape s{};
  s.format = p.cache.format;
  s.head_dim = p.cache.head_dim;
  s.heads_per_group = p.group();
  s.row_bytes = row_bytes(s.format, s.head_dim);
  s.words = ceil_div(s.row_bytes, 4);
  s.units_per_word = (s.int4() ? kCodesPerWord : kHalvesPerWord) / Isa::kDepthPerUnit;
  s.key_depth = s.words * s.units_per_word;
  s.scale_groups = s.int4() ? format::Int4Kv::groups(s.head_dim) : 1;
  s.group_depth = s.int4() ? format::Int4Kv::kGroup / Isa::kDepthPerUnit : s.key_depth;
  s.value_vectors =
      s.int4() ? kCodesPerLane * ceil_div(s.head_dim, kCodesPerLane * Isa::kLanes) : ceil_div(s.head_dim, Isa::kLanes);
  s.group_vectors = s.int4() ? format::Int4Kv::kGroup / Isa::kLanes : s.value_vectors;
  s.query_terms = p.query == Query::kFloat32 && Isa::kDepthPerUnit == 2 ? 2 : 1;
  return s;
}

// Tokens whose K rows are decoded together.
inline constexpr int64_t kTokensPerStep = 16;

// The K or V rows of a tile. Past the tokens held they read as zeros, so that no other memory is touched.
struct Rows {
  static constexpr uint8_t kZeros[2 * kMaxHeadDim] = {};
  const uint8_t* first;
  int64_t stride;   // bytes
  int64_t held;
  int64_t bytes;    // of a row

  const uint8_t* operator[](int64_t token) const { return token < held ? first + token * stride : kZeros; }
};

}  // namespace tilewright::int4_fp8_attention
