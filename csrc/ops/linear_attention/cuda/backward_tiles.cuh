// SPDX-License-Identifier: Apache-2.0
// What the kernels of the gradient share: tiles, fragments, where scratch lies.
#pragma once

#include "hopper/hopper.h"
#include "ops/linear_attention/cuda/backward.h"

namespace tilewright::linear_attention::cuda::backward {

using hopper::Barrier;
using hopper::Swizzle;
using hopper::TensorMap;

inline constexpr int kGroup = 128;  // threads of a warpgroup
inline constexpr int kSlice = ChunkBackward::kSlice;
inline constexpr int kPairs = kChunk * kChunk;

struct Params {
  ChunkBackward p;
  TensorMap q, k, v, d_out;  // [B, T, heads, channels], boxes of 64 tokens by 64 channels
};

template <class T, int kKey>
struct Tiles {
  using Keys = hopper::Tile<T, kChunk, kKey, Swizzle::k128>;  // of a chunk: q, k
  using Values = hopper::Tile<T, kChunk, kSlice, Swizzle::k128>;  // of a chunk, one slice: v, dO, W, dY
  using Pairs = hopper::Tile<T, kChunk, kChunk, Swizzle::k128>;  // P, X, E, N
  using State = hopper::Tile<T, kSlice, kKey, Swizzle::k128>;  // a slice of S^T
};

inline constexpr int kFactorBytes = ChunkBackward::kFactors * kChunk * static_cast<int>(sizeof(float));

// The factors of a chunk in shared memory.
struct Factors {
  const float* at;

  TILEWRIGHT_DEVICE float log(int i) const { return at[i]; }
  TILEWRIGHT_DEVICE float into(int i) const { return at[kChunk + i]; }
  TILEWRIGHT_DEVICE float onto(int i) const { return at[2 * kChunk + i]; }
  TILEWRIGHT_DEVICE float beta(int i) const { return at[3 * kChunk + i]; }
  // Of tokens i and i + 1, i even.
  TILEWRIGHT_DEVICE float2 intos(int i) const { return *reinterpret_cast<const float2*>(at + kChunk + i); }
  TILEWRIGHT_DEVICE float2 ontos(int i) const { return *reinterpret_cast<const float2*>(at + 2 * kChunk + i); }
  TILEWRIGHT_DEVICE float2 betas(int i) const { return *reinterpret_cast<const float2*>(at + 3 * kChunk + i); }
  TILEWRIGHT_DEVICE float whole(int /*channel*/ = 0) const { return into(kChunk - 1); }  // no token, no decay
};

// With a decay a channel, tiles of keys and queries have theirs inside; what remains are exp(G_n), by channel, and beta.
struct ChannelFactors {
  const float* at;

  TILEWRIGHT_DEVICE float log(int /*i*/) const { return 0.0f; }
  TILEWRIGHT_DEVICE float into(int /*i*/) const { return 1.0f; }
  TILEWRIGHT_DEVICE float onto(int /*i*/) const { return 1.0f; }
  TILEWRIGHT_DEVICE float beta(int i) const { return at[3 * kChunk + i]; }
  TILEWRIGHT_DEVICE float2 intos(int /*i*/) const { return {1.0f, 1.0f}; }
  TILEWRIGHT_DEVICE float2 ontos(int /*i*/) const { return {1.0f, 1.0f}; }
  TILEWRIGHT_DEVICE float2 betas(int i) const { return *reinterpret_cast<const float2*>(at + 3 * kChunk + i); }
  TILEWRIGHT_DEVICE float whole(int channel) const { return at[channel]; }
};
static_assert(ChunkBackward::kMaxKeySize <= 3 * kChunk, "a factor a channel fits before beta");

// Scratch of a chunk's value head.
TILEWRIGHT_DEVICE int64_t pair_of(const ChunkBackward& p, int64_t place, int head) {
  return place * p.value_heads + head;
}
template <class E>
TILEWRIGHT_DEVICE E* factors_of(E* factors, int64_t pair) {
  return factors + pair * (kFactorBytes / static_cast<int64_t>(sizeof(float)));
}
template <class E>
TILEWRIGHT_DEVICE E* pairs_of(E* tiles, int64_t pair) {
  return tiles + pair * kPairs;
}
template <class E>
TILEWRIGHT_DEVICE E* keys_of(E* tiles, int64_t pair) {
  return tiles + pair * kChunk * ChunkBackward::kMaxKeySize;
}
template <class E>
TILEWRIGHT_DEVICE E* slice_of(const ChunkBackward& p, E* tiles, int64_t pair, int slice, int columns) {
  return tiles + (pair * p.slices() + slice) * kSlice * columns;
}

// The register operand, or the words of a store, that columns 16 step to 16 step + 15 of an accumulator make.
template <class T, int N>
TILEWRIGHT_DEVICE void fragment(const float (&d)[N], int step, uint32_t (&a)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) a[j] = hopper::pack_pair<T>(d[8 * step + 2 * j], d[8 * step + 2 * j + 1]);
}

// Where lane l of a warp of a group points for 16 x 16 elements of a tile whose rows are the accumulator's ...
template <class Tile>
TILEWRIGHT_DEVICE char* along(char* tile, int thread, int step) {
  const int lane = thread % 32, matrix = lane / 8;
  return tile + Tile::offset(thread / 32 * 16 + 8 * (matrix % 2) + lane % 8, 16 * step + 8 * (matrix / 2));
}
// ... and of one whose columns are the accumulator's rows.
template <class Tile>
TILEWRIGHT_DEVICE char* across(char* tile, int thread, int step) {
  const int lane = thread % 32, matrix = lane / 8;
  return tile + Tile::offset(16 * step + 8 * (matrix / 2) + lane % 8, thread / 32 * 16 + 8 * (matrix % 2));
}

// Rows [first, kChunk) become zero: in a packed batch they are the next sequence's.
template <class Tile>
TILEWRIGHT_DEVICE void clear_rows(char* tile, int first, int thread, int threads) {
  constexpr unsigned kPerRow = Tile::kCols / 8;
  const unsigned count = static_cast<unsigned>(Tile::kRows - first) * kPerRow;
  for (auto i = static_cast<unsigned>(thread); i < count; i += static_cast<unsigned>(threads)) {
    const int row = first + static_cast<int>(i / kPerRow), column = static_cast<int>(i % kPerRow * 8);
    hopper::store_16(tile + Tile::offset(row, column), {0, 0, 0, 0});
  }
}

// A tile of 64 tokens from `token` on, from channel `column` on.
template <class Tile>
TILEWRIGHT_DEVICE void load_rows(char* tile, const TensorMap& map, Barrier& barrier, int column, int head,
                                 int64_t token, int64_t batch) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    hopper::load_tile(tile + panel * Tile::kBytesPerPanel, map, barrier, column + panel * Tile::kPanelCols, head,
                      static_cast<int>(token), static_cast<int>(batch));
  }
}

// The thread's number, read anew: addresses made of it are made where they are used, not kept in registers between loops.
TILEWRIGHT_DEVICE int fresh_thread() {
  uint32_t thread[1] = {threadIdx.x};
  hopper::keep(thread);
  return static_cast<int>(thread[0] % 1024u);
}

// This warp has read a stage.
TILEWRIGHT_DEVICE void release(Barrier& empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) hopper::arrive(empty);
}

// What a block of the sequential kernels works on.
struct Column {
  Sequence sequence;
  int64_t n;
  int head, slice, chunks;

  TILEWRIGHT_DEVICE int rows(int chunk) const {
    const int64_t left = sequence.tokens - static_cast<int64_t>(chunk) * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk);
  }
  TILEWRIGHT_DEVICE int64_t token(int chunk) const { return sequence.first + static_cast<int64_t>(chunk) * kChunk; }
};

TILEWRIGHT_DEVICE Column column_of(const ChunkBackward& p, int64_t block) {
  Column at;
  at.slice = static_cast<int>(block % p.slices());
  block /= p.slices();
  at.head = static_cast<int>(block % p.value_heads);
  at.n = block / p.value_heads;
  at.sequence = sequence_of(p.sequences, at.n);
  at.chunks = static_cast<int>(chunks_of(at.sequence.tokens));
  return at;
}

// Where this thread's part of a slice of a [N, HV, K, V] lies, and of it register i of an accumulator of S^T.
TILEWRIGHT_DEVICE int64_t state_start(const ChunkBackward& p, const Column& at, int64_t place, int thread) {
  return (place * p.value_heads + at.head) * p.key_size * p.value_size + at.slice * kSlice +
         hopper::accumulator_row(thread, 0) + static_cast<int64_t>(hopper::accumulator_col(thread, 0)) * p.value_size;
}
TILEWRIGHT_DEVICE int state_step(const ChunkBackward& p, int i) {
  return (8 * (i / 4) + i % 2) * p.value_size + 8 * (i / 2 % 2);
}
TILEWRIGHT_DEVICE bool in_state(const ChunkBackward& p, const Column& at, int thread, int i) {
  return hopper::accumulator_col(thread, i) < p.key_size &&
         at.slice * kSlice + hopper::accumulator_row(thread, i) < p.value_size;
}

// State times what the whole chunk leaves of it.
template <class F, int N>
TILEWRIGHT_DEVICE void decay_state(const F& f, int thread, float (&state)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) state[i] *= f.whole(hopper::accumulator_col(thread, i));
}

template <int N>
TILEWRIGHT_DEVICE void load_state(const ChunkBackward& p, const Column& at, const float* from, int64_t place,
                                  int thread, float (&state)[N]) {
  const int64_t start = state_start(p, at, place, thread);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    state[i] = from != nullptr && in_state(p, at, thread, i) ? from[start + state_step(p, i)] : 0.0f;
  }
}

template <int N>
TILEWRIGHT_DEVICE void store_state(const ChunkBackward& p, const Column& at, float* to, int64_t place, int thread,
                                   const float (&state)[N]) {
  const int64_t start = state_start(p, at, place, thread);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (in_state(p, at, thread, i)) to[start + state_step(p, i)] = state[i];
  }
}

}  // namespace tilewright::linear_attention::cuda::backward
