// SPDX-License-Identifier: Apache-2.0
// How a problem is cut into independent items. Pure: only sizes are read. A cut depends on its own sequence alone, never
// on its neighbours or on threads, hence the same bits for any packing and any number of threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/local_linear_attention/problem.h"

namespace tilewright::local_linear_attention {

inline constexpr int64_t kRowsPerBlock = 48;  // queries times query heads of a key head: whole strips of 12 and of 6
inline constexpr int64_t kKeysPerTile = 64;

// One sequence's share of the items.
struct Span {
  Segment segment;
  int64_t first_block;  // blocks are counted over all sequences and key heads
  int64_t blocks;  // of queries, for one key head
  int64_t first_key_item;
  int64_t key_tiles;  // for one key head
};

struct Plan {
  std::vector<Span> spans;
  int64_t queries_per_block;
  int64_t blocks;  // items of the forward pass, and of the backward pass over queries
  int64_t key_items;  // items of the backward pass over keys: a tile of keys of one key head
};

Plan choose_plan(const Shape& shape, const std::vector<Segment>& segments);
std::string describe(const Plan& plan);

// A block of queries of one sequence with all query heads of one key head.
struct BlockItem {
  Segment segment;
  int64_t block;  // counted over all, the row of centres
  int64_t kv_head;
  int64_t first, queries;  // within the segment
};
// Blocks of a causal sequence cost more the later they are: light and heavy ones alternate.
BlockItem block_item(const Plan& plan, int64_t index);

struct KeyItem {
  const Span* span;
  int64_t kv_head;
  int64_t first, keys;  // within the segment
};
KeyItem key_item(const Plan& plan, int64_t index);

// 64-byte aligned memory of the calling thread, kept for its next item.
void* thread_memory(int64_t bytes);
// Gives it back where it is large: a thread that once met a long sequence does not hold on to its scratch.
void trim_thread_memory();

}  // namespace tilewright::local_linear_attention
