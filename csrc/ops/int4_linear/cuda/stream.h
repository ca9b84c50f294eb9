// SPDX-License-Identifier: Apache-2.0
// How a product of few tokens, bound by reading the weights, is cut for a GPU; stream.cuh is the kernel. Pure: numbers in,
// numbers out.
//
// Weights come in units of 16 rows, a panel, by 128 columns, a tile. A cluster of blocks has some panels, each of its blocks
// a part of their tiles; a block's warps have equal runs of its units.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/memory.h"
#include "format/int4_hopper.h"

namespace tilewright::int4_linear::stream {

inline constexpr int kWarps = 16;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kPanelRows = 16;
inline constexpr int kMostTokens = 16;
inline constexpr int kAhead = 4;  // units that a warp has on the way
inline constexpr int kUnitBytes = 1024 + 32 * 4;  // of each in shared memory: codes, and both scales for every lane
inline constexpr int kTileBytes = 8 * format::Int4Hopper::kCols * 2;  // of 8 tokens by a tile in shared memory
inline constexpr int kMostPanels = 32;  // of a block: their sums are kept to the end
inline constexpr int kMostShared = 232448;  // bytes of a block
inline constexpr int64_t kMostRows = int64_t{1} << 19;  // products of shares stay within 32 bits

// Where part `index` of `parts` nearly equal parts begins; total * parts < 2^31.
constexpr int share_of(int total, int index, int parts) { return total * index / parts; }

struct Cut {
  int tiles, panels;
  int splits;  // blocks of a cluster
  int clusters, panels_of_block;  // of a block at most
  int shared_bytes;
  bool fits;

  constexpr int blocks() const { return clusters * splits; }
  constexpr int tiles_of_block() const { return (tiles + splits - 1) / splits; }
  // Sums of warps that meet in a panel, and in a cluster those of the panels.
  constexpr int slots() const { return kWarps + panels_of_block - 1 + (splits > 1 ? panels_of_block : 0); }
};

namespace detail {

// Microseconds on an H200, near enough to choose between cuts, fitted to what was measured: a multiprocessor takes in 31
// bytes of weights in a nanosecond, 21 with more than 8 tokens, and rearranges 20 bytes of tokens; the rest is the same for
// all but what a cluster costs.
inline double complete(Cut& cut, int64_t tokens, int splits, int multiprocessors) {
  // Of an H100's 132 multiprocessors, 30 clusters of four find a place at once, and 66 of two.
  const int together = std::max(1, splits > 2 ? multiprocessors * 10 / 11 / splits : multiprocessors / splits);
  const int waves = static_cast<int>(ceil_div(cut.panels, together * kMostPanels));
  cut.splits = splits;
  cut.clusters = std::min(cut.panels, waves * together);
  cut.panels_of_block = static_cast<int>(ceil_div(cut.panels, cut.clusters));
  const int groups = tokens <= 8 ? 1 : 2;
  const int64_t bytes = kWarps * kAhead * kUnitBytes + int64_t{cut.tiles_of_block()} * kTileBytes * groups +
                        int64_t{cut.slots()} * kPanelRows * 8 * groups * 4;
  cut.shared_bytes = static_cast<int>(std::min<int64_t>(bytes, kMostShared));
  cut.fits = bytes <= kMostShared && splits <= cut.tiles;
  const double weights = 1056.0 * cut.panels_of_block * cut.tiles_of_block();
  const double columns = static_cast<double>(cut.tiles_of_block()) * format::Int4Hopper::kCols;
  return waves * (weights / (groups == 1 ? 31e3 : 21e3) + columns * static_cast<double>(tokens) / 20e3) +
         (splits == 1   ? 0.0
          : splits == 2 ? 3.5
                        : 8.0);
}

}  // namespace detail

// The cut that takes least time; it does not fit where there are too many tokens, rows or columns for any.
inline Cut choose_cut(int64_t tokens, int64_t rows, int64_t columns, int multiprocessors) {
  Cut best{};
  if (tokens > kMostTokens || rows > kMostRows || rows == 0) return best;
  double least = 0.0;
  for (int splits = 1; splits <= 4; splits *= 2) {
    Cut cut{};
    cut.tiles = static_cast<int>(ceil_div(columns, format::Int4Hopper::kCols));
    cut.panels = static_cast<int>(ceil_div(rows, kPanelRows));
    const double time = detail::complete(cut, tokens, splits, multiprocessors);
    if (!cut.fits || (best.fits && time >= least)) continue;
    least = time;
    best = cut;
  }
  return best;
}

}  // namespace tilewright::int4_linear::stream
