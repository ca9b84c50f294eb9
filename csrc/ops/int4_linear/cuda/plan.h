// SPDX-License-Identifier: Apache-2.0
// How a product is cut for the GPU. Pure: numbers in, numbers out; the walk is what kernel and tests both follow.
//
// The output is cut into tiles of rows (features) by tokens. A persistent block takes tiles one after the other. Where the
// tiles do not divide well among the multiprocessors, the first `split_tiles` of them are cut along K instead: their
// (tile, 128 columns) units in a row, an equal run for each block. Pieces of such a tile are added in the order of K by the
// block that finishes last, so that the result does not depend on which one that is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "format/int4_hopper.h"

namespace tilewright::int4_linear {

inline constexpr int kConsumers = 2;  // warpgroups that multiply; one more loads
inline constexpr int kMatrixThreads = 128 * (kConsumers + 1);
inline constexpr int kMaxStages = 40;
inline constexpr int kStagingTokens = 32;  // tokens that the epilogue turns around at once
inline constexpr int kStagingPitch = 68;  // floats of 64 rows, padded: a warp's stores touch every bank once

// Up to this many tokens a tile has 64 rows, and the consumers take turns along K: there are then tiles for most
// multiprocessors, each with all of its weights on the way at once, and no other block to wait for. Beyond it each consumer
// has rows of its own, so that tokens are read less often.
constexpr bool takes_turns(int token_tile) { return token_tile <= 64; }
// 64-row blocks of a tile.
constexpr int tile_blocks(int token_tile, int group_blocks) {
  return takes_turns(token_tile) ? 1 : kConsumers * group_blocks;
}
// Blocks of a cluster: neighbours along the rows, which share the tokens that each of them loads a part of.
constexpr int cluster_blocks(int group_blocks) { return group_blocks == 2 ? 2 : 1; }
// Floats of shared memory behind the stages: the epilogue's staging, what a consumer hands over, the tokens' scales.
constexpr int staging_floats(int token_tile) {
  const int staging = (token_tile < kStagingTokens ? token_tile : kStagingTokens) * kStagingPitch;
  return (takes_turns(token_tile) ? staging + 64 * token_tile : kConsumers * staging) + kConsumers * token_tile;
}

// Signed: sign-and-magnitude codes. Unsigned: codes 0..15 and a correction by the sums of x. Fold: e4m3(q * scale).
enum class Form : uint8_t { kSigned = 0, kUnsigned = 1, kFold = 2 };

// What a block does next: columns [128 first, 128 last) of a tile.
struct Segment {
  int tile, first, last;
};

// Tiles are those of a cluster (see cluster_blocks), and so are the `blocks` that share them.
struct Work {
  int tiles, k_tiles, split_tiles, blocks;
  int run, longer;  // units of a block; the first `longer` blocks have one more

  constexpr int first_unit(int block) const { return block * run + (block < longer ? block : longer); }
  // The block whose run holds a unit, and the blocks that share a split tile.
  constexpr int block_of(int unit) const {
    const int in_longer = longer * (run + 1);
    return unit < in_longer ? unit / (run + 1) : longer + (unit - in_longer) / run;
  }
  constexpr int first_block(int tile) const { return block_of(tile * k_tiles); }
  constexpr int last_block(int tile) const { return block_of((tile + 1) * k_tiles - 1); }
  // Where a block keeps its piece of a split tile: the run of a block touches at most two tiles in part.
  constexpr int piece_slot(int block, int tile) const {
    return 2 * block + (first_unit(block) / k_tiles == tile ? 0 : 1);
  }
};

// The segments of a block, in order: those of its run of units, then whole tiles. False behind the last one.
constexpr bool segment_of(const Work& work, int block, int index, Segment& segment) {
  const int unit = work.first_unit(block), unit_end = work.first_unit(block + 1);
  const int tile = unit / work.k_tiles + index, start = tile * work.k_tiles;
  if (start < unit_end) {
    const int left = unit_end - start;
    segment = {tile, index == 0 ? unit - start : 0, left < work.k_tiles ? left : work.k_tiles};
    return true;
  }
  const int of_run = unit_end == unit ? 0 : (unit_end - 1) / work.k_tiles - unit / work.k_tiles + 1;
  segment = {work.split_tiles + block + (index - of_run) * work.blocks, 0, work.k_tiles};
  return segment.tile < work.tiles;
}

struct DevicePlan {
  Form form;
  bool fine;  // scales change within 128 columns: the partial sum is taken up every 32, or 16
  int token_tile;  // tokens of a tile: N of the instruction
  int group_blocks;  // 64-row blocks that a consumer warpgroup multiplies by the same tokens
  int token_tiles, row_tiles;
  int stages;
  int stage_bytes, shared_bytes;
  Work work;

  int blocks_of_tile() const { return tile_blocks(token_tile, group_blocks); }
  int cluster() const { return cluster_blocks(group_blocks); }
  int64_t piece_floats() const { return int64_t{64} * blocks_of_tile() * token_tile; }
  int64_t piece_slots() const { return work.split_tiles == 0 ? 0 : int64_t{2} * work.blocks * cluster(); }
  int64_t counters() const { return int64_t{work.split_tiles} * cluster() * kConsumers; }
};

namespace detail {

// Microseconds on an H100, near enough to choose between two ways of cutting. A unit is 128 columns of a tile: bound by
// the matrix unit, or by what one multiprocessor can take in. All of them together are bound by the memory. Joining pieces
// costs a round trip to the second-level cache and their bytes.
inline double unit_time(const DevicePlan& plan) {
  const double rows = plan.blocks_of_tile() * 64.0;
  return std::max(rows * plan.token_tile * 128 / 4096 / 1500, (rows * 66 + plan.token_tile * 128) / 70e3);
}
inline double memory_time(const DevicePlan& plan, int tiles) {
  return static_cast<double>(tiles) / plan.token_tiles * plan.work.k_tiles * plan.cluster() * plan.blocks_of_tile() *
         64 * 66 / 2.8e6;
}
inline double join_time(const DevicePlan& plan, int blocks) {
  return 2.0 + 2.0 * blocks * plan.cluster() * static_cast<double>(plan.piece_floats()) * 4 / 4.0e6;
}

inline void divide_work(DevicePlan& plan, int k_tiles, int multiprocessors) {
  Work& work = plan.work;
  const int most = std::max(1, multiprocessors / plan.cluster());
  work.tiles = static_cast<int>(ceil_div(plan.row_tiles, plan.cluster())) * plan.token_tiles;  // far below 2^31
  work.k_tiles = k_tiles;
  work.split_tiles = 0;
  work.blocks = std::min(work.tiles, most);
  work.run = work.longer = 0;
  const int left = work.tiles % most;
  if (left == 0) return;
  const int units = left * k_tiles;
  const int blocks = std::min(units, most);
  if (blocks < most && work.tiles > left) return;  // every block's run must hold a unit
  const double memory = memory_time(plan, left);
  const double whole = std::max(memory, k_tiles * unit_time(plan));
  const double split = std::max(memory, static_cast<double>(ceil_div(units, blocks)) * unit_time(plan));
  if (split + join_time(plan, blocks) >= whole) return;
  work.split_tiles = left;
  work.blocks = blocks;
  work.run = units / blocks;
  work.longer = units % blocks;
}

}  // namespace detail

inline Form form_of(const format::Int4HopperView& weight, bool fold) {
  if (fold) return Form::kFold;
  return weight.signed_codes ? Form::kSigned : Form::kUnsigned;
}

// The tile sizes that kernels exist for.
inline void choose_tile(DevicePlan& plan, int64_t m) {
  const bool main_form = plan.form == Form::kSigned && !plan.fine;
  plan.group_blocks = 1;
  if (m <= 16) {
    plan.token_tile = main_form && m <= 8 ? 8 : 16;
  } else if (main_form && m <= 64) {
    plan.token_tile = m <= 32 ? 32 : 64;
  } else {
    plan.token_tile = 128;
    if (plan.form != Form::kUnsigned && !plan.fine && m > 128) plan.group_blocks = 2;
  }
}

inline DevicePlan choose_device_plan(int64_t m, const format::Int4HopperView& weight, bool fold, int multiprocessors) {
  DevicePlan plan{};
  plan.form = form_of(weight, fold);
  plan.fine = weight.sub != format::Int4Hopper::kCols;
  choose_tile(plan, m);
  plan.token_tiles = static_cast<int>(ceil_div(m, plan.token_tile));
  plan.row_tiles = static_cast<int>(ceil_div(weight.blocks, plan.blocks_of_tile()));
  const int sums = plan.form == Form::kUnsigned ? weight.subs() * plan.token_tile * 4 : 0;
  plan.stage_bytes =
      plan.blocks_of_tile() * static_cast<int>(weight.chunk_bytes) + plan.token_tile * format::Int4Hopper::kCols + sums;
  const int staging = staging_floats(plan.token_tile) * 4;
  constexpr int kMaxShared = 232448, kBarriers = 1024;
  plan.stages = std::min(kMaxStages, (kMaxShared - staging - kBarriers) / plan.stage_bytes);
  plan.shared_bytes = plan.stages * plan.stage_bytes + staging + kBarriers;
  detail::divide_work(plan, static_cast<int>(weight.tiles), multiprocessors);
  return plan;
}

std::string describe(const DevicePlan& plan);

}  // namespace tilewright::int4_linear
