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
#include "ops/int4_linear/cuda/stream.h"

namespace tilewright::int4_linear {

inline constexpr int kConsumers = 2;  // warpgroups that multiply; one more loads
inline constexpr int kMatrixThreads = 128 * (kConsumers + 1);
inline constexpr int kMaxStages = 48;
inline constexpr int kBarrierBytes = 1024;  // of shared memory, before the stages
inline constexpr int kNarrowPitch =
    144;  // bytes of a token's 64 rows of 16 bits in the staging: eight in a row share no bank
inline constexpr int kWideTokens = 32;  // tokens that the epilogue turns around at once where rows of y are not so
inline constexpr int kWidePitch = 272;  // bytes of a token's 64 rows there, as floats

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
// Shared memory behind the stages: each consumer's staging for the epilogue, what a consumer hands over, the tokens' scales.
constexpr int epilogue_bytes(int token_tile) {
  const int narrow = token_tile * kNarrowPitch,
            wide = (token_tile < kWideTokens ? token_tile : kWideTokens) * kWidePitch;
  return narrow > wide ? narrow : wide;
}
constexpr int staging_bytes(int token_tile) {
  const int epilogue = epilogue_bytes(token_tile), handed = 64 * token_tile * 4;
  return (takes_turns(token_tile) ? epilogue + handed : kConsumers * epilogue) + kConsumers * token_tile * 4;
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
  stream::Cut stream;  // where it fits, stream.cuh takes the product and nothing below holds
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

// Of a chunk in shared memory, where swizzled boxes start at multiples of 1024.
inline int slot_bytes(const format::Int4HopperView& weight) {
  return static_cast<int>(round_up(weight.chunk_bytes, 1024));
}

namespace detail {

// Microseconds on an H100, near enough to choose between ways of cutting. A unit is 128 columns of a tile. It is bound by
// the matrix unit, by what one multiprocessor can take in (15 KB of weights in a microsecond and the start of a copy of
// tokens, as measured with plain bulk copies; boxes are taken to be no slower), or by what all the busy ones take from the
// second-level cache.
inline double unit_time(const DevicePlan& plan, int busy_blocks) {
  const double rows = plan.blocks_of_tile() * 64.0;
  const double weights = rows * 66, tokens = plan.token_tile * 128.0;
  const double cached = (weights + tokens / plan.cluster()) * busy_blocks * plan.cluster() / 5.0e6;
  return std::max({rows * plan.token_tile * 128 / 4096 / 1500, weights / 15e3 + 0.05, cached});
}
// The weights of some tiles come from memory once.
inline double memory_time(const DevicePlan& plan, int tiles) {
  return static_cast<double>(tiles) / plan.token_tiles * plan.work.k_tiles * plan.cluster() * plan.blocks_of_tile() *
         64 * 66 / 2.8e6;
}
// Pieces make a round trip to the second-level cache, with their bytes.
inline double join_time(const DevicePlan& plan, int blocks) {
  return 2.0 + 2.0 * blocks * plan.cluster() * static_cast<double>(plan.piece_floats()) * 4 / 4.0e6;
}

// Shares the tiles out among the blocks, and gives the time that it may take.
inline double divide_work(DevicePlan& plan, int k_tiles, int multiprocessors) {
  Work& work = plan.work;
  const int most = std::max(1, multiprocessors / plan.cluster());
  work.tiles = static_cast<int>(ceil_div(plan.row_tiles, plan.cluster())) * plan.token_tiles;  // far below 2^31
  work.k_tiles = k_tiles;
  work.split_tiles = 0;
  work.blocks = std::min(work.tiles, most);
  work.run = work.longer = 0;
  const int left = work.tiles % most;
  const double full = work.tiles / most * k_tiles * unit_time(plan, most);
  if (left == 0) return full;
  const double memory = memory_time(plan, left);
  const double whole = full + std::max(memory, k_tiles * unit_time(plan, left));
  const int units = left * k_tiles;
  const int blocks = std::min(units, most);
  if (blocks < most && work.tiles > left) return whole;  // every block's run must hold a unit
  const double split = full + join_time(plan, blocks) +
                       std::max(memory, static_cast<double>(ceil_div(units, blocks)) * unit_time(plan, blocks));
  if (split >= whole) return whole;
  work.split_tiles = left;
  work.blocks = blocks;
  work.run = units / blocks;
  work.longer = units % blocks;
  return split;
}

// As many stages as fit beside the rest.
inline void divide_memory(DevicePlan& plan, const format::Int4HopperView& weight) {
  const int sums = plan.form == Form::kUnsigned ? weight.subs() * plan.token_tile * 4 : 0;
  const int tokens = plan.token_tile * format::Int4Hopper::kCols;
  plan.stage_bytes = plan.blocks_of_tile() * slot_bytes(weight) + sums + tokens;
  const int64_t beside = staging_bytes(plan.token_tile) + kBarrierBytes;
  plan.stages = static_cast<int>(std::clamp<int64_t>((stream::kMostShared - beside) / plan.stage_bytes, 0, kMaxStages));
  plan.shared_bytes = static_cast<int>(plan.stages * plan.stage_bytes + beside);
}

// Everything that follows from the tile; gives the time that it may take.
inline double complete(DevicePlan& plan, int64_t m, const format::Int4HopperView& weight, int multiprocessors) {
  plan.token_tiles = static_cast<int>(ceil_div(m, plan.token_tile));
  plan.row_tiles = static_cast<int>(ceil_div(weight.blocks, plan.blocks_of_tile()));
  divide_memory(plan, weight);
  return divide_work(plan, static_cast<int>(weight.tiles), multiprocessors);
}

// The kernel for few tokens takes signed codes with one scale of 16 bits a row and chunk.
inline stream::Cut choose_stream(const DevicePlan& plan, int64_t m, const format::Int4HopperView& weight,
                                 int multiprocessors) {
  if (plan.form != Form::kSigned || plan.fine || format::scale_bytes(weight.scale_type) != 2) return {};
  return stream::choose_cut(m, weight.n, weight.k, multiprocessors);
}

}  // namespace detail

inline Form form_of(const format::Int4HopperView& weight, bool fold) {
  if (fold) return Form::kFold;
  return weight.signed_codes ? Form::kSigned : Form::kUnsigned;
}

// The number of tokens of a tile, among those that kernels exist for.
inline int choose_token_tile(const DevicePlan& plan, int64_t m) {
  const bool main_form = plan.form == Form::kSigned && !plan.fine;
  if (m <= 16) return 16;
  if (main_form && m <= 64) return m <= 32 ? 32 : 64;
  return 128;
}

inline DevicePlan choose_device_plan(int64_t m, const format::Int4HopperView& weight, bool fold, int multiprocessors) {
  DevicePlan plan{};
  plan.form = form_of(weight, fold);
  plan.fine = weight.sub != format::Int4Hopper::kCols;
  plan.stream = detail::choose_stream(plan, m, weight, multiprocessors);
  if (plan.stream.fits) return plan;
  plan.token_tile = choose_token_tile(plan, m);
  plan.group_blocks = 1;
  const double one = detail::complete(plan, m, weight, multiprocessors);
  if (plan.token_tile == 128 && plan.form != Form::kUnsigned && !plan.fine) {
    DevicePlan wide = plan;
    wide.group_blocks = 2;
    if (detail::complete(wide, m, weight, multiprocessors) < one) return wide;
  }
  return plan;
}

std::string describe(const DevicePlan& plan);

}  // namespace tilewright::int4_linear
