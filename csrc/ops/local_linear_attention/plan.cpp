// SPDX-License-Identifier: Apache-2.0
#include "ops/local_linear_attention/plan.h"

#include <algorithm>
#include <sstream>

#include "core/memory.h"

namespace tilewright::local_linear_attention {
namespace {

int64_t zigzag(int64_t index, int64_t count) { return index % 2 == 0 ? index / 2 : count - 1 - index / 2; }

}  // namespace

Plan choose_plan(const Shape& shape, const std::vector<Segment>& segments) {
  Plan plan{};
  plan.queries_per_block = std::max<int64_t>(1, kRowsPerBlock / std::max<int64_t>(shape.group(), 1));
  for (const Segment& segment : segments) {
    const Span span{segment, plan.blocks, ceil_div(segment.queries, plan.queries_per_block), plan.key_items,
                    ceil_div(segment.keys, kKeysPerTile)};
    plan.blocks += span.blocks * shape.kv_heads;
    plan.key_items += span.key_tiles * shape.kv_heads;
    plan.spans.push_back(span);
  }
  return plan;
}

std::string describe(const Plan& plan) {
  std::ostringstream text;
  text << plan.spans.size() << " sequences, " << plan.blocks << " blocks of up to " << plan.queries_per_block
       << " queries, " << plan.key_items << " tiles of " << kKeysPerTile << " keys";
  return text.str();
}

BlockItem block_item(const Plan& plan, int64_t index) {
  const auto after = std::upper_bound(plan.spans.begin(), plan.spans.end(), index,
                                      [](int64_t i, const Span& span) { return i < span.first_block; });
  const Span& span = *(after - 1);
  const int64_t head = (index - span.first_block) / span.blocks;
  const int64_t block = zigzag((index - span.first_block) % span.blocks, span.blocks);
  const int64_t first = block * plan.queries_per_block;
  return {span.segment, span.first_block + head * span.blocks + block, head, first,
          std::min(plan.queries_per_block, span.segment.queries - first)};
}

KeyItem key_item(const Plan& plan, int64_t index) {
  const auto after = std::upper_bound(plan.spans.begin(), plan.spans.end(), index,
                                      [](int64_t i, const Span& span) { return i < span.first_key_item; });
  const Span& span = *(after - 1);
  const int64_t head = (index - span.first_key_item) / span.key_tiles;
  const int64_t first = zigzag((index - span.first_key_item) % span.key_tiles, span.key_tiles) * kKeysPerTile;
  return {&span, head, first, std::min(kKeysPerTile, span.segment.keys - first)};
}

namespace {

constexpr int64_t kKeptBytes = int64_t{16} << 20;

thread_local Scratch memory;
thread_local int64_t held = 0;

}  // namespace

void* thread_memory(int64_t bytes) {
  held = std::max(held, bytes);
  return memory.get<char>(bytes);
}

void trim_thread_memory() {
  if (held <= kKeptBytes) return;
  memory = Scratch{};
  held = 0;
}

}  // namespace tilewright::local_linear_attention
