// SPDX-License-Identifier: Apache-2.0
// How a problem is cut into independent items. Pure: only shapes, cu_seqlens and lengths are read, not q or the cache.
//
// An item is a block of queries of one sequence and all query heads of one KV head, against all keys that the block
// sees. A sequence with a single block of queries (decoding) is cut along its keys too, into chunks whose partial
// results wait in the workspace; whoever finishes a sequence's last chunk combines them in order. Cuts depend on the
// sequence alone, never on its neighbours or on threads, hence the same bits for any packing and any number of threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/int4_fp8_attention/problem.h"

namespace tilewright::int4_fp8_attention {

inline constexpr int64_t kKeysPerTile = 64;  // decoded at a time; tiles start at multiples of it
inline constexpr int64_t kKeysPerChunk = 256;  // chunks start at multiples of it
inline constexpr int64_t kRowsPerBlock = 192;  // query tokens times heads per KV head, about

// One sequence's share of the items.
struct Span {
  int64_t sequence;
  int64_t first_item;
  int64_t first_query;  // row of q
  int64_t queries;  // n_s
  int64_t length;
  int64_t blocks;  // of queries
  int64_t first_chunk;  // the chunk that holds the first visible key
  int64_t chunks;  // 1: results go to out at once
  int64_t partials_at;  // bytes into the workspace, when chunks > 1
  int64_t counters_at;  // likewise: int32 [H_kv]
};

struct Plan {
  std::vector<Span> spans;  // of sequences that have queries
  int64_t items;
  int64_t queries_per_block;
  int64_t counter_bytes;  // the workspace begins with counters, zero before the first run; a run of all items
  // leaves them zero, so that one workspace serves many runs
  int64_t workspace_bytes;
  int64_t cache_bytes;  // read once per block of queries
  int64_t operations;  // multiplications and additions on visible pairs
};

// Reads shapes, packed, causal and window of the problem; the pointers to data may still be null. The same plan serves
// every problem that differs in pointers only, such as the layers of a model.
Plan choose_plan(const Problem& problem);
std::string describe(const Plan& plan);

// What one item does.
struct Item {
  int64_t sequence, kv_head;
  int64_t first_query, queries;  // rows of q
  int64_t first_position;  // of the first of them
  int64_t length;
  int64_t key_begin, key_end;  // keys that at least one of its queries may see
  int64_t chunk, chunks;
  int64_t partials_at, counter_at;  // bytes into the workspace, when chunks > 1

  int64_t rows(int64_t group) const { return queries * group; }
};

Item item_at(const Problem& problem, const Plan& plan, int64_t index);

// Keys [begin, end) that the query at a position sees.
struct Visible {
  int64_t begin, end;
};
Visible visible_keys(const Problem& problem, int64_t position, int64_t length);

}  // namespace tilewright::int4_fp8_attention
