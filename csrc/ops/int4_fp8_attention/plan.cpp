// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_fp8_attention/plan.h"

#include <algorithm>
#include <sstream>

#include "ops/int4_fp8_attention/partials.h"

namespace tilewright::int4_fp8_attention {
namespace {

// Blocks of a causal prompt cost more the later they are. Light and heavy ones alternate, so that any contiguous range
// of items costs about its share.
int64_t zigzag(int64_t index, int64_t blocks) { return index % 2 == 0 ? index / 2 : blocks - 1 - index / 2; }

Span span_of(const Problem& p, int64_t s, int64_t queries_per_block) {
  Span span{};
  span.sequence = s;
  span.first_query = p.packed.cu_seqlens[s];
  span.queries = p.packed.cu_seqlens[s + 1] - span.first_query;
  span.length = p.packed.lengths[s];
  span.blocks = ceil_div(span.queries, queries_per_block);
  span.chunks = 1;
  if (span.blocks == 1) {
    const int64_t begin = visible_keys(p, span.length - span.queries, span.length).begin;
    span.first_chunk = begin / kKeysPerChunk;
    span.chunks = std::max<int64_t>(1, ceil_div(span.length, kKeysPerChunk) - span.first_chunk);
  }
  return span;
}

int64_t visible_pairs(const Problem& p, const Span& span) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < span.queries; ++i) {
    const Visible keys = visible_keys(p, span.length - span.queries + i, span.length);
    pairs += std::max<int64_t>(0, keys.end - keys.begin);
  }
  return pairs;
}

}  // namespace

Visible visible_keys(const Problem& p, int64_t position, int64_t length) {
  const int64_t begin = p.window > position ? 0 : position - p.window + 1;
  return {begin, p.causal ? std::min(position + 1, length) : length};
}

Plan choose_plan(const Problem& p) {
  Plan plan{};
  const int64_t group = p.group();
  plan.queries_per_block = std::max<int64_t>(1, kRowsPerBlock / group);
  const int64_t row = row_bytes(p.cache.format, p.cache.head_dim) +
                      scale_row_bytes(p.cache.format, p.cache.scale_type, p.cache.head_dim);
  for (int64_t s = 0; s < p.packed.sequences; ++s) {
    Span span = span_of(p, s, plan.queries_per_block);
    if (span.queries == 0) continue;
    span.first_item = plan.items;
    plan.items += p.cache.heads * span.blocks * span.chunks;
    plan.operations += 4 * p.heads * p.cache.head_dim * visible_pairs(p, span);
    plan.cache_bytes += 2 * p.cache.heads * row * span.length;
    if (span.chunks > 1) {
      span.counters_at = plan.counter_bytes;
      plan.counter_bytes += p.cache.heads * static_cast<int64_t>(sizeof(int32_t));
    }
    plan.spans.push_back(span);
  }
  plan.counter_bytes = round_up(plan.counter_bytes, kCacheLine);
  plan.workspace_bytes = plan.counter_bytes;
  for (Span& span : plan.spans) {
    if (span.chunks == 1) continue;
    span.partials_at = plan.workspace_bytes;
    plan.workspace_bytes += p.cache.heads * span.chunks * partial_bytes(span.queries * group, p.cache.head_dim);
  }
  return plan;
}

Item item_at(const Problem& p, const Plan& plan, int64_t index) {
  const auto after = std::upper_bound(plan.spans.begin(), plan.spans.end(), index,
                                      [](int64_t i, const Span& span) { return i < span.first_item; });
  const Span& span = *(after - 1);
  const int64_t local = index - span.first_item;
  Item item{};
  item.sequence = span.sequence;
  item.length = span.length;
  item.chunks = span.chunks;
  item.chunk = local % span.chunks;
  const int64_t block = zigzag(local / span.chunks % span.blocks, span.blocks);
  item.kv_head = local / span.chunks / span.blocks;
  item.first_query = span.first_query + block * plan.queries_per_block;
  item.queries = std::min(plan.queries_per_block, span.queries - block * plan.queries_per_block);
  item.first_position = span.length - span.queries + block * plan.queries_per_block;
  const int64_t last_position = item.first_position + item.queries - 1;
  item.key_begin = visible_keys(p, item.first_position, span.length).begin;
  item.key_end = visible_keys(p, last_position, span.length).end;
  if (span.chunks > 1) {
    const int64_t chunk_begin = (span.first_chunk + item.chunk) * kKeysPerChunk;
    item.key_begin = std::max(item.key_begin, chunk_begin);
    item.key_end = std::min(item.key_end, chunk_begin + kKeysPerChunk);
    const int64_t bytes = partial_bytes(item.rows(p.group()), p.cache.head_dim);
    item.partials_at = span.partials_at + item.kv_head * span.chunks * bytes;
    item.counter_at = span.counters_at + item.kv_head * static_cast<int64_t>(sizeof(int32_t));
  }
  return item;
}

std::string describe(const Plan& plan) {
  int64_t chunked = 0;
  for (const Span& span : plan.spans) chunked += span.chunks > 1 ? 1 : 0;
  std::ostringstream text;
  text << "items=" << plan.items << " queries_per_block=" << plan.queries_per_block << " chunked_sequences=" << chunked
       << " workspace_bytes=" << plan.workspace_bytes << " cache_bytes=" << plan.cache_bytes
       << " operations=" << plan.operations;
  return text.str();
}

}  // namespace tilewright::int4_fp8_attention
