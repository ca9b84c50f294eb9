// SPDX-License-Identifier: Apache-2.0
// First chunk to last: W of each chunk and the state before it. A block has 64 columns of a value head's state: a warpgroup
// that computes and a warp that brings the next chunks. S^T [64 columns, K] stays in float32 registers.
//
//   R^T = V^T - S^T K^T diag(into)         W^T = R^T - (R^T D) X^T        S^T = whole S^T + (W^T diag(onto beta)) K
#pragma once

#include <type_traits>

#include "ops/linear_attention/cuda/backward_tiles.cuh"

namespace tilewright::linear_attention::cuda::backward {

inline constexpr int kSweepThreads = kGroup + 32;
inline constexpr int kStages = 2;

template <bool kChannel>
using SweepFactors = std::conditional_t<kChannel, ChannelFactors, Factors>;

// A ring of stages between the warp that loads and the warpgroup that computes.
struct Ring {
  Barrier full[kStages], empty[kStages];

  TILEWRIGHT_DEVICE void start() {
    for (int i = 0; i < kStages; ++i) {
      hopper::init(full[i], 1);
      hopper::init(empty[i], kGroup / 32);
    }
    hopper::fence_barrier_init();
  }
};

template <class T, int kKey, bool kChannel>
struct StatesShared {
  using All = Tiles<T, kKey>;
  // Of a stage. Keys that read the state, and keys that write to it: with a decay a token the same.
  static constexpr int kKeys = 0;
  static constexpr int kWriters = kChannel ? kKeys + All::Keys::kBytes : kKeys;
  static constexpr int kInverse = kWriters + All::Keys::kBytes;
  static constexpr int kValues = kInverse + All::Pairs::kBytes;
  static constexpr int kFactors = kValues + All::Values::kBytes;
  static constexpr int kStageBytes = kFactors + kFactorBytes;
  static_assert(kStageBytes % 1024 == 0, "tiles start at multiples of 1024 bytes");
  // Behind the stages.
  static constexpr int kState = kStages * kStageBytes;
  static constexpr int kErrors = kState + All::State::kBytes;
  static constexpr int kRing = kErrors + All::Values::kBytes;
  static constexpr int kBytes = kRing + static_cast<int>(sizeof(Ring));
};

template <class T, int kKey, bool kDelta, bool kChannel>
TILEWRIGHT_DEVICE void load_states_stages(const Params& params, const Column& at, char* shared, Ring& ring) {
  using Shared = StatesShared<T, kKey, kChannel>;
  using All = Tiles<T, kKey>;
  const ChunkBackward& p = params.p;
  hopper::PipelineState<kStages> state;
  for (int c = 0; c < at.chunks; ++c, state.advance()) {
    char* stage = shared + state.stage * Shared::kStageBytes;
    Barrier& full = ring.full[state.stage];
    hopper::wait(ring.empty[state.stage], state.phase ^ 1);
    hopper::arrive_expect(full, (kChannel ? 2 : 1) * All::Keys::kBytes + All::Values::kBytes + kFactorBytes +
                                    (kDelta ? All::Pairs::kBytes : 0));
    const int64_t pair = pair_of(p, at.sequence.place + c, at.head);
    if constexpr (kChannel) {
      hopper::load_bulk(stage + Shared::kKeys, keys_of(p.keys_into, pair), All::Keys::kBytes, full);
      hopper::load_bulk(stage + Shared::kWriters, keys_of(p.keys_onto, pair), All::Keys::kBytes, full);
    } else {
      load_rows<typename All::Keys>(stage + Shared::kKeys, params.k, full, 0, at.head / (p.value_heads / p.heads),
                                    at.token(c), at.sequence.batch);
    }
    load_rows<typename All::Values>(stage + Shared::kValues, params.v, full, at.slice * kSlice, at.head, at.token(c),
                                    at.sequence.batch);
    if constexpr (kDelta) {
      hopper::load_bulk(stage + Shared::kInverse, pairs_of(p.inverse, pair), All::Pairs::kBytes, full);
    }
    hopper::load_bulk(stage + Shared::kFactors, factors_of(p.factors, pair), kFactorBytes, full);
  }
}

// A chunk's values as an accumulator of [64 columns, 64 tokens] has them; zero where there is no token.
template <class T, int kKey>
TILEWRIGHT_DEVICE void load_values(char* tile, int rows, int thread, float (&d)[kChunk / 2]) {
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    uint32_t words[4];
    hopper::ldmatrix_x4_transposed(words, across<typename Tiles<T, kKey>::Values>(tile, thread, step));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float low, high;
      hopper::unpack_pair<T>(words[j], low, high);
      const int token = hopper::accumulator_col(thread, 8 * step + 2 * j);
      d[8 * step + 2 * j] = token < rows ? low : 0.0f;
      d[8 * step + 2 * j + 1] = token + 1 < rows ? high : 0.0f;
    }
  }
}

// d (+)= S^T K^T, S^T in registers.
template <class T, int kKey>
TILEWRIGHT_DEVICE void read_state(const uint32_t (&state)[kKey / 16][4], char* keys, float (&d)[kChunk / 2]) {
  using Keys = typename Tiles<T, kKey>::Keys;
#pragma unroll
  for (int step = 0; step < kKey / 16; ++step) {
    hopper::Wgmma<T, T, kChunk>::run(d, state[step], Keys::k_major(keys, 0, 16 * step), step > 0);
  }
}

// state += rows K, rows [64 columns, 64 tokens] in registers.
template <class T, int kKey>
TILEWRIGHT_DEVICE void write_state(const uint32_t (&rows)[kChunk / 16][4], char* keys, float (&state)[kKey / 2]) {
  using Keys = typename Tiles<T, kKey>::Keys;
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    hopper::Wgmma<T, T, kKey, hopper::Major::kK, hopper::Major::kMN>::run(state, rows[step],
                                                                          Keys::mn_major(keys, 16 * step, 0), true);
  }
}

template <class T, int N>
TILEWRIGHT_DEVICE void fragments(const float (&d)[N], uint32_t (&a)[N / 8][4]) {
#pragma unroll
  for (int step = 0; step < N / 8; ++step) fragment<T>(d, step, a[step]);
}

// d = R^T becomes W^T = R^T - (R^T D) X^T; read = S^T K^T.
template <class T, int kKey, class F>
TILEWRIGHT_DEVICE void correct(const F& f, const float (&read)[kChunk / 2], char* inverse, int thread,
                               float (&d)[kChunk / 2]) {
  using Pairs = typename Tiles<T, kKey>::Pairs;
  float scaled[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk / 2; i += 4) {
    const int token = hopper::accumulator_col(thread, i);
    const float2 into = f.intos(token), beta = f.betas(token);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      d[i + x] -= (x % 2 == 0 ? into.x : into.y) * read[i + x];
      scaled[i + x] = -(x % 2 == 0 ? beta.x : beta.y) * d[i + x];
    }
  }
  uint32_t a[kChunk / 16][4];
  fragments<T>(scaled, a);
  hopper::keep(d);
  hopper::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    hopper::Wgmma<T, T, kChunk>::run(d, a[step], Pairs::k_major(inverse, 0, 16 * step), true);
  }
  hopper::wgmma_commit();
  hopper::wgmma_wait<0>();
  hopper::keep(d);
}

template <class T, int kKey>
TILEWRIGHT_DEVICE void stage_state(const uint32_t (&state)[kKey / 16][4], char* tile, int thread) {
#pragma unroll
  for (int step = 0; step < kKey / 16; ++step) {
    hopper::stmatrix_x4(along<typename Tiles<T, kKey>::State>(tile, thread, step), state[step]);
  }
}

// [64 columns, 64 tokens] of an accumulator as a tile of tokens.
template <class T, int kKey>
TILEWRIGHT_DEVICE void stage_rows(const float (&d)[kChunk / 2], char* tile, int thread) {
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    uint32_t words[4];
    fragment<T>(d, step, words);
    hopper::stmatrix_x4_transposed(across<typename Tiles<T, kKey>::Values>(tile, thread, step), words);
  }
}

// All have staged a tile: thread 0 sends it off. What it sent before has then been read, and may be overwritten.
TILEWRIGHT_DEVICE void send(void* to, const char* tile, int bytes, int thread) {
  hopper::fence_async_shared();
  if (thread == 0) hopper::store_wait<0>();
  hopper::named_sync(1, kGroup);
  if (thread == 0) {
    hopper::store_bulk(to, tile, static_cast<uint32_t>(bytes));
    hopper::store_commit();
  }
}

// The same without a tile to send.
TILEWRIGHT_DEVICE void await_sent(int thread) {
  if (thread == 0) hopper::store_wait<0>();
  hopper::named_sync(1, kGroup);
}

// In a packed batch the rows behind a sequence are the next one's: nothing of them may reach a product.
template <class Tile>
TILEWRIGHT_DEVICE void clear_tail(char* tile, int rows, int thread) {
  if (rows == kChunk) return;
  clear_rows<Tile>(tile, rows, thread, kGroup);
  hopper::fence_async_shared();
  hopper::named_sync(1, kGroup);
}

// Starts S^T = whole S^T + (d diag(onto beta)) K.
template <class T, int kKey, class F>
TILEWRIGHT_DEVICE void start_update(const F& f, char* keys, int thread, float (&d)[kChunk / 2],
                                    uint32_t (&a)[kChunk / 16][4], float (&state)[kKey / 2]) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; i += 4) {
    const int token = hopper::accumulator_col(thread, i);
    const float2 onto = f.ontos(token), beta = f.betas(token);
#pragma unroll
    for (int x = 0; x < 4; ++x) d[i + x] *= x % 2 == 0 ? onto.x * beta.x : onto.y * beta.y;
  }
  fragments<T>(d, a);
  decay_state(f, thread, state);
  hopper::keep(state);
  hopper::wgmma_fence();
  write_state<T, kKey>(a, keys, state);
  hopper::wgmma_commit();
}

// Tiles are sent off while a product runs: the barrier that this takes then costs nothing.
template <class T, int kKey, bool kDelta, bool kChannel>
TILEWRIGHT_DEVICE void sweep_states(const ChunkBackward& p, const Column& at, char* shared, Ring& ring) {
  using Shared = StatesShared<T, kKey, kChannel>;
  using All = Tiles<T, kKey>;
  const int thread = static_cast<int>(threadIdx.x);
  float state[kKey / 2];
  load_state(p, at, p.initial_state, p.initial_by_chunk ? at.sequence.place : at.n, thread, state);
  hopper::PipelineState<kStages> turn;
  for (int c = 0; c < at.chunks; ++c, turn.advance()) {
    char* stage = shared + turn.stage * Shared::kStageBytes;
    const SweepFactors<kChannel> f{reinterpret_cast<const float*>(stage + Shared::kFactors)};
    const int64_t pair = pair_of(p, at.sequence.place + c, at.head);
    const int rows = at.rows(c);
    uint32_t before[kKey / 16][4], writing[kChunk / 16][4];
    float writes[kChunk / 2], read[kChunk / 2];
    fragments<T>(state, before);
    stage_state<T, kKey>(before, shared + Shared::kState, thread);
    hopper::wait(ring.full[turn.stage], turn.phase);
    if constexpr (!kChannel) clear_tail<typename All::Keys>(stage + Shared::kKeys, rows, thread);
    if constexpr (kDelta) {
      hopper::wgmma_fence();
      read_state<T, kKey>(before, stage + Shared::kKeys, read);
      hopper::wgmma_commit();
    }
    load_values<T, kKey>(stage + Shared::kValues, rows, thread, writes);
    send(slice_of(p, p.states, pair, at.slice, kKey), shared + Shared::kState, All::State::kBytes, thread);
    if constexpr (kDelta) {
      hopper::wgmma_wait<0>();
      hopper::keep(read);
      correct<T, kKey>(f, read, stage + Shared::kInverse, thread, writes);
      stage_rows<T, kKey>(writes, shared + Shared::kErrors, thread);
    }
    start_update<T, kKey>(f, stage + Shared::kWriters, thread, writes, writing, state);
    if constexpr (kDelta) {
      send(slice_of(p, p.errors, pair, at.slice, kSlice), shared + Shared::kErrors, All::Values::kBytes, thread);
    } else {
      await_sent(thread);
    }
    hopper::wgmma_wait<0>();
    hopper::keep(state);
    release(ring.empty[turn.stage]);
  }
  if (thread == 0) hopper::store_wait<0>();
}

}  // namespace tilewright::linear_attention::cuda::backward
