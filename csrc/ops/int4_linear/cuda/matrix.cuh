// SPDX-License-Identifier: Apache-2.0
// y^T = W x^T on the matrix units, W in 4 bits as the register operand.
//
// One warpgroup loads chunks of weights and 128 columns of a tile of tokens. Two warpgroups multiply: each turns the words of
// its 64 (or 2 x 64) rows into e4m3 bytes in registers, multiplies them by the tokens in shared memory, and adds the partial
// sums of a group, times the group's scale, to its float32 totals. With few tokens both have the same 64 rows and every other
// 128 columns.
#pragma once

#include "hopper/hopper.h"
#include "ops/int4_linear/cuda/launch.h"

namespace tilewright::int4_linear {

using format::Int4Hopper;
using format::OffsetKind;
using format::ScaleType;

// N: tokens of a tile. Blocks: 64-row blocks of a consumer. Fine: scales change within 128 columns.
template <int N, int Blocks, Form F, bool Fine>
struct Config {
  static constexpr int kTokens = N;
  static constexpr int kBlocks = Blocks;
  static constexpr Form kForm = F;
  static constexpr bool kFine = Fine;
  static constexpr int kRegisters = N / 2;  // of one 64 x N accumulator
  static constexpr bool kTurns = takes_turns(N);
  static constexpr int kTileBlocks = tile_blocks(N, Blocks);
  static constexpr int kPieceTokens =
      N / 2;  // of the products that are issued together where a consumer has its own rows
  static constexpr int kPieceRegisters = kPieceTokens / 2;
  static constexpr int kBatch = Fine ? 1 : N <= 16 ? 4 : 2;  // chunks that a consumer that takes turns has at once
  static constexpr int kCluster = cluster_blocks(Blocks);
  static constexpr int kReleases = 4 * kConsumers * kCluster;  // warps that use a stage, or let it pass
  using Tokens = hopper::Tile<hopper::e4m3, N, Int4Hopper::kCols, hopper::Swizzle::k128>;
  using Product = hopper::Wgmma<hopper::e4m3, hopper::e4m3, N>;
  using Piece = hopper::Wgmma<hopper::e4m3, hopper::e4m3, kPieceTokens>;
};

// Named barriers; 0 is the block's.
inline constexpr int kConsumerBarrier = 1;  // each consumer has its own
inline constexpr int kHandOverBarrier = kConsumerBarrier + kConsumers;  // two

// Chunks come as boxes with the widest swizzle: the copy engine moves plain runs of bytes at a fraction of that rate.
inline constexpr int kLineBytes = 128;

struct MatrixParams {
  hopper::TensorMap x;  // codes, boxes of 128 columns by kTokens
  hopper::TensorMap chunks;  // of weights: rows of 128 bytes, boxes of a chunk
  const float* per_tensor_scale;
  const float* x_scales;
  const float* x_sums;  // [k_tiles * subs, sums_stride]
  const void* bias;
  const void* residual;  // null, or [M, N] of y_type, added
  void* y;
  float* pieces;
  int32_t* counters;
  int64_t m, n, k, sums_stride, piece_floats;
  int chunk_bytes, slot_bytes, row_blocks, token_tiles, stages, sub, scale_bytes;
  ScaleType scale_type;
  OffsetKind offset_kind;
  Number bias_type, y_type;
  bool narrow;  // rows of y, and of the residual, are 16-bit numbers that can be moved 8 at a time
  bool overlap;
  Work work;
};

// The parts of shared memory: the barriers, stages of tokens, of weights and of sums, the epilogue's staging. Places are worked
// out where they are needed: a loop that has all registers in use keeps no pointers.
template <class C>
struct Shared {
  int weight_bytes, sum_bytes;  // of a stage
  int stages;

  TILEWRIGHT_DEVICE explicit Shared(const MatrixParams& p)
      : weight_bytes(C::kTileBlocks * p.slot_bytes),
        sum_bytes(C::kForm == Form::kUnsigned ? Int4Hopper::kCols / p.sub * C::kTokens * 4 : 0),
        stages(p.stages) {}

  TILEWRIGHT_DEVICE hopper::Barrier& full(int stage) const {
    return reinterpret_cast<hopper::Barrier*>(hopper::shared_memory())[stage];
  }
  TILEWRIGHT_DEVICE hopper::Barrier& empty(int stage) const { return full(kMaxStages + stage); }
  // Pieces of a tile that were there before this block's, for each consumer.
  TILEWRIGHT_DEVICE int32_t& joined(int consumer) const {
    return reinterpret_cast<int32_t*>(&full(2 * kMaxStages))[consumer];
  }
  TILEWRIGHT_DEVICE char* tokens_of(int stage) const {
    return hopper::shared_memory() + kBarrierBytes + stage * C::Tokens::kBytes;
  }
  TILEWRIGHT_DEVICE char* chunk_of(const MatrixParams& p, int stage, int block) const {
    return tokens_of(stages) + stage * weight_bytes + block * p.slot_bytes;
  }
  TILEWRIGHT_DEVICE float* sums_of(int stage) const {
    return reinterpret_cast<float*>(tokens_of(stages) + stages * weight_bytes + stage * sum_bytes);
  }
  TILEWRIGHT_DEVICE char* staging() const { return reinterpret_cast<char*>(sums_of(stages)); }
  // [kConsumers][kTokens] of the tokens of the tile that is written.
  TILEWRIGHT_DEVICE float* scales(int consumer) const {
    auto* end = reinterpret_cast<float*>(staging() + staging_bytes(C::kTokens));
    return end - (kConsumers - consumer) * C::kTokens;
  }
};

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  TILEWRIGHT_DEVICE void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  // At most `stages` steps.
  TILEWRIGHT_DEVICE void hop(int steps, int stages) {
    stage += steps;
    if (stage >= stages) {
      stage -= stages;
      phase ^= 1;
    }
  }
  TILEWRIGHT_DEVICE void skip(int steps, int stages) {
    stage += steps;
    phase ^= static_cast<uint32_t>(stage / stages) & 1u;
    stage %= stages;
  }
};

// Whose work this block shares: its cluster, and its place there.
template <class C>
TILEWRIGHT_DEVICE int cluster_index() {
  return static_cast<int>(blockIdx.x) / C::kCluster;
}
template <class C>
TILEWRIGHT_DEVICE int rank_in_cluster() {
  return static_cast<int>(blockIdx.x) % C::kCluster;
}
// The first of the 64-row blocks of this block's part of a tile.
template <class C>
TILEWRIGHT_DEVICE int first_row_block(const MatrixParams& p, int tile) {
  return (tile / p.token_tiles * C::kCluster + rank_in_cluster<C>()) * C::kTileBlocks;
}

// A block's 128-column steps one by one.
struct Steps {
  int index = 0, k = -1;
  Segment segment{0, 0, 0};

  TILEWRIGHT_DEVICE bool next(const Work& work, int block) {
    if (++k < segment.last) return true;
    if (!segment_of(work, block, index++, segment)) return false;
    k = segment.first;
    return true;
  }
};

// --- The producer: one thread.

template <class C>
TILEWRIGHT_DEVICE void load_weights(const MatrixParams& p, const Shared<C>& shared, const Steps& at, int stage) {
  const int first = first_row_block<C>(p, at.segment.tile);
  const int blocks = max(0, min(C::kTileBlocks, p.row_blocks - first));
  hopper::Barrier& full = shared.full(stage);
  hopper::arrive_expect(full, static_cast<uint32_t>(blocks * p.chunk_bytes + C::Tokens::kBytes + shared.sum_bytes));
  for (int b = 0; b < blocks; ++b) {
    const int chunk = (first + b) * p.work.k_tiles + at.k;
    hopper::load_tile(shared.chunk_of(p, stage, b), p.chunks, full, 0, chunk * (p.chunk_bytes / kLineBytes));
  }
}

template <class C>
TILEWRIGHT_DEVICE void load_tokens(const MatrixParams& p, const Shared<C>& shared, const Steps& at, int stage) {
  const int token = at.segment.tile % p.token_tiles * C::kTokens;
  hopper::Barrier& full = shared.full(stage);
  if constexpr (C::kCluster == 1) {
    hopper::load_tile(shared.tokens_of(stage), p.x, full, at.k * Int4Hopper::kCols, token);
  } else {
    constexpr int kPart = C::kTokens / C::kCluster;
    const int first = rank_in_cluster<C>() * kPart;
    hopper::load_tile_multicast(shared.tokens_of(stage) + first * Int4Hopper::kCols, p.x, full, (1 << C::kCluster) - 1,
                                at.k * Int4Hopper::kCols, token + first);
  }
  if constexpr (C::kForm == Form::kUnsigned) {
    const int subs = Int4Hopper::kCols / p.sub;
    for (int s = 0; s < subs; ++s) {
      hopper::load_bulk(shared.sums_of(stage) + s * C::kTokens,
                        p.x_sums + (static_cast<int64_t>(at.k) * subs + s) * p.sums_stride + token, C::kTokens * 4,
                        full);
    }
  }
}

// The weights depend on no other kernel: the first stages of them are on their way before the tokens exist.
template <class C>
TILEWRIGHT_DEVICE void produce(const MatrixParams& p, const Shared<C>& shared) {
  const int block = cluster_index<C>();
  Steps at;
  int ahead = 0;
  while (ahead < p.stages && at.next(p.work, block)) load_weights(p, shared, at, ahead++);
  if (p.overlap) hopper::wait_for_previous_kernel();
  Steps tokens;
  for (int stage = 0; stage < ahead; ++stage) {
    tokens.next(p.work, block);
    load_tokens(p, shared, tokens, stage);
  }
  if (ahead < p.stages) return;
  for (Ring ring; at.next(p.work, block); ring.advance(p.stages)) {
    hopper::wait(shared.empty(ring.stage), ring.phase);
    load_weights(p, shared, at, ring.stage);
    load_tokens(p, shared, at, ring.stage);
  }
}

}  // namespace tilewright::int4_linear
