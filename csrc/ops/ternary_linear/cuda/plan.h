// SPDX-License-Identifier: Apache-2.0
// How a problem is cut for a GPU. Pure: no memory is touched, no device asked.
#pragma once

#include <cstdint>
#include <string>

#include "format/ternary.h"
#include "ops/common/weight_stream.h"

namespace tilewright::ternary_linear {

// Few tokens: the cut of the kernel that reads weights as a stream. Beyond, and where that does not fit: tiles of rows by
// tokens, K perhaps cut into splits whose sums the last block adds up.
struct DevicePlan {
  weight_stream::Cut stream;  // where it fits, nothing below holds
  int tile_tokens;   // 32, 64 or 128
  int subtiles;      // 64-row tiles of each of the two warpgroups, 1 or 2
  int splits;        // pieces of K
  int64_t row_tiles;
  int64_t token_tiles;
  int64_t blocks;
  int shared_bytes;

  int64_t tiles() const { return row_tiles * token_tiles; }
  int tile_rows() const { return 128 * subtiles; }
};

inline constexpr int kStreamAhead = 8;  // units that a warp of small.cuh has on the way

DevicePlan choose_device_plan(int64_t m, int64_t n, int64_t k, int multiprocessors);
std::string describe(const DevicePlan& plan);

// A stage of the large kernel: 128 columns of the weights and of the tokens.
constexpr int large_stage_bytes(int tile_tokens, int subtiles) { return subtiles * 2 * 2048 + tile_tokens * 128; }
constexpr int large_stages(int tile_tokens, int subtiles) {
  const int fit = 200 * 1024 / large_stage_bytes(tile_tokens, subtiles);
  return fit > 12 ? 12 : fit;
}

}  // namespace tilewright::ternary_linear
