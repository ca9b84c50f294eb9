// SPDX-License-Identifier: Apache-2.0
// How a problem is cut for a GPU. Pure: no memory is touched, no device asked.
#pragma once

#include <cstdint>
#include <string>

#include "format/ternary.h"

namespace tilewright::ternary_linear {

// Up to kMostSmallTokens tokens: a block takes 16 * panels rows and all of K, its warps share K among
// them. Beyond: tiles of rows by tokens, K perhaps cut into splits whose sums the last block adds up.
struct DevicePlan {
  bool small;
  int panels;        // small: 1, 2, 4 or 8 panels of 16 rows a block
  int cluster;       // small: blocks that fetch activations together
  int tile_tokens;   // large: 32, 64 or 128
  int subtiles;      // large: 64-row tiles of each of the two warpgroups, 1 or 2
  int splits;        // large: pieces of K
  int64_t row_tiles;
  int64_t token_tiles;
  int64_t blocks;
  int shared_bytes;

  int64_t tiles() const { return row_tiles * token_tiles; }
  int tile_rows() const { return 128 * subtiles; }
};

inline constexpr int kMostSmallTokens = 16;
// Chunks of 128 columns whose activations a block of the small kernel keeps at a time, for up to 8 tokens; half for 16.
inline constexpr int kSmallPhaseChunks = 64;
inline constexpr int kSmallWarps = 8;
// Shared memory: a barrier, the sums of every warp for up to 16 tokens, then tiles of tokens from a multiple of 1024 bytes.
inline constexpr int kSmallBarrierBytes = 128;
inline constexpr int kSmallHeaderBytes = 9216;
static_assert(kSmallBarrierBytes + kSmallWarps * 16 * kMostSmallTokens * 4 <= kSmallHeaderBytes);

DevicePlan choose_device_plan(int64_t m, int64_t n, int64_t k, int multiprocessors);
std::string describe(const DevicePlan& plan);

// A stage of the large kernel: 128 columns of the weights and of the tokens.
constexpr int large_stage_bytes(int tile_tokens, int subtiles) { return subtiles * 2 * 2048 + tile_tokens * 128; }
constexpr int large_stages(int tile_tokens, int subtiles) {
  const int fit = 200 * 1024 / large_stage_bytes(tile_tokens, subtiles);
  return fit > 12 ? 12 : fit;
}

}  // namespace tilewright::ternary_linear
