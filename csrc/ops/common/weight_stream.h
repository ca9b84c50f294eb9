// SPDX-License-Identifier: Apache-2.0
// How a product of few tokens is cut for a GPU where it is bound by reading the weights; weight_stream.cuh is the kernel.
// Pure: numbers in, numbers out.
//
// Weights come in units of 16 rows, a panel, by 128 columns, a tile. A cluster of blocks has some panels, each of its blocks
// a part of their tiles; a block's warps have equal runs of its units.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/memory.h"

namespace tilewright::weight_stream {

inline constexpr int kWarps = 16;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kPanelRows = 16;
inline constexpr int kTileColumns = 128;
inline constexpr int kMostTokens = 16;
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

struct Problem {
  int64_t tokens, rows, columns;
  int unit_bytes;  // of weights
  int token_bytes;  // of 8 tokens by a tile, in shared memory
  int ring_bytes;   // of the units that a block has on the way, there too
};

namespace detail {

// Microseconds, near enough to choose between cuts: a multiprocessor takes in 31 bytes of weights in a nanosecond and 20 of
// tokens, which lie in the second-level cache and are rearranged; a block starts and ends in one microsecond, and a cluster meets in 0.7.
inline double complete(Cut& cut, const Problem& problem, int splits, int multiprocessors) {
  // Of an H100's 132 multiprocessors, 30 clusters of four find a place at once, and 66 of two.
  const int together = std::max(1, splits > 2 ? multiprocessors * 10 / 11 / splits : multiprocessors / splits);
  const int waves = static_cast<int>(ceil_div(cut.panels, together * kMostPanels));
  cut.splits = splits;
  cut.clusters = std::min(cut.panels, waves * together);
  cut.panels_of_block = static_cast<int>(ceil_div(cut.panels, cut.clusters));
  const int groups = problem.tokens <= 8 ? 1 : 2;
  const int64_t bytes = problem.ring_bytes + int64_t{cut.tiles_of_block()} * problem.token_bytes * groups +
                        int64_t{cut.slots()} * kPanelRows * 8 * groups * 4;
  cut.shared_bytes = static_cast<int>(std::min<int64_t>(bytes, kMostShared));
  cut.fits = bytes <= kMostShared && splits <= std::max(cut.tiles, 1);
  const double weights = static_cast<double>(cut.panels_of_block) * cut.tiles_of_block() * problem.unit_bytes;
  const double tokens = static_cast<double>(cut.tiles_of_block()) * static_cast<double>(problem.tokens) * kTileColumns;
  return waves * (1.0 + weights / 31e3 + tokens / 20e3 + (splits > 1 ? 0.7 : 0.0));
}

}  // namespace detail

// The cut that takes least time; it does not fit where there are too many tokens, rows or columns for any.
inline Cut choose_cut(const Problem& problem, int multiprocessors) {
  Cut best{};
  if (problem.tokens > kMostTokens || problem.rows > kMostRows) return best;
  double least = 0.0;
  for (int splits = 1; splits <= 4; splits *= 2) {
    Cut cut{};
    cut.tiles = static_cast<int>(ceil_div(problem.columns, kTileColumns));
    cut.panels = static_cast<int>(ceil_div(problem.rows, kPanelRows));
    if (cut.panels == 0) return best;
    const double time = detail::complete(cut, problem, splits, multiprocessors);
    if (!cut.fits || (best.fits && time >= least)) continue;
    least = time;
    best = cut;
  }
  return best;
}

}  // namespace tilewright::weight_stream
