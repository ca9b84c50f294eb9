// SPDX-License-Identifier: Apache-2.0
// Which form runs, how much memory it works in, and how the chunk form's second kernel shares its work. Pure.
#pragma once

#include <algorithm>

#include "ops/linear_attention/cuda/prepared.h"

namespace tilewright::linear_attention::cuda {

// Columns of V that a warpgroup keeps the state of, and warpgroups of a block at most.
inline constexpr int kGroupColumns = 64;
inline constexpr int kMaxGroups = 2;

template <class In, class T>
int64_t batch_of(const Problem<In, T>& p) {
  return p.sequences.offsets == nullptr ? p.sequences.count : 1;
}

// Places of chunks, once for every value head.
template <class In, class T>
int64_t tiles_of(const Problem<In, T>& p) {
  return chunk_places(p.sequences.count, p.sequences.tokens, p.sequences.offsets != nullptr) * p.value_heads;
}

// Rows of 16-bit numbers that the copy engine and 16-byte loads can read: no dimension is repeated.
template <class In>
bool copyable(const Rows<const In>& rows, int64_t batch, int64_t tokens, int64_t heads) {
  const auto fits = [](int64_t size, int64_t stride) { return size <= 1 || (stride > 0 && stride % 8 == 0); };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && fits(batch, rows.batch) && fits(tokens, rows.token) &&
         fits(heads, rows.head);
}

// Whether the chunk form takes a problem with 16-bit inputs: K at most 256, with a decay a channel 128, and rows that
// begin at multiples of 16 bytes.
template <class In, class T>
bool takes_chunks(const Problem<In, T>& p) {
  const int64_t batch = batch_of(p), tokens = p.sequences.tokens;
  // Tokens and places are counted in 32 bits.
  const int keys = tile_keys(p.key_size);
  return keys > 0 && (keys <= 128 || p.decay != Decay::kChannel) && tiles_of(p) < (int64_t{1} << 31) - kChunk &&
         tokens < (int64_t{1} << 31) - kChunk && p.key_size % 8 == 0 && p.value_size % 8 == 0 && tokens > 1 &&
         p.slots == nullptr && copyable(p.q, batch, tokens, p.heads) && copyable(p.k, batch, tokens, p.heads) &&
         copyable(p.v, batch, tokens, p.value_heads);
}

// The chunk form works in no more memory than this, unless 16 chunks or packed sequences need more: long sequences go
// through it in stretches.
inline constexpr int64_t kMostChunkBytes = int64_t{1} << 30;

template <class In, class T>
int64_t stretch_tokens(const Problem<In, T>& p) {
  if (p.sequences.offsets != nullptr) return p.sequences.tokens;
  Prepared unused;
  const int64_t chunk = place_buffers(p.rule, p.decay, p.key_size, p.sequences.count * p.value_heads, nullptr, unused);
  if (chunk == 0) return p.sequences.tokens;
  const int64_t tokens = kChunk * std::max<int64_t>(kMostChunkBytes / chunk, 16);
  return std::min(tokens, p.sequences.tokens);
}

// Bytes of device memory that the chunk form works in; it begins at a multiple of 16.
template <class In, class T>
int64_t chunk_form_bytes(const Problem<In, T>& p) {
  Prepared unused;
  Problem<In, T> stretch = p;
  stretch.sequences.tokens = stretch_tokens(p);
  return place_buffers(p.rule, p.decay, p.key_size, tiles_of(stretch), nullptr, unused);
}

// Value heads that one block of the first kernel takes: the group of a key head, less where blocks are few.
inline int plan_members(int64_t blocks, int64_t group, int multiprocessors) {
  int64_t members = group;
  while (members > 1 && blocks * ceil_div(group, members) < 4 * multiprocessors) members = ceil_div(members, 2);
  return static_cast<int>(members);
}

struct StatesPlan {
  int groups;  // of 64 columns of V, that a block has
  int tiles;  // blocks that share the columns of a state
};

// Two warpgroups of a block share the tiles of keys, unless one each keeps more multiprocessors busy. Of more than 128
// keys each of two warpgroups has half, and a block has 64 columns.
inline StatesPlan plan_states(int64_t states, int64_t key_size, int64_t value_size, int multiprocessors) {
  const int64_t columns = ceil_div(value_size, kGroupColumns);
  if (tile_keys(key_size) > 128) return {1, static_cast<int>(columns)};
  const bool pairs = columns > 1 && states * ceil_div(columns, kMaxGroups) >= multiprocessors;
  const int groups = pairs ? kMaxGroups : 1;
  return {groups, static_cast<int>(ceil_div(columns, groups))};
}

}  // namespace tilewright::linear_attention::cuda
