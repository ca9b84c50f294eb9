// SPDX-License-Identifier: Apache-2.0
// Last chunk to first: dY of each chunk (dV of the additive rule) and the gradient of the state behind it. Blocks as in
// backward_states.cuh; dS^T [64 columns, K] stays in float32 registers.
//
//   dU^T = dO^T P + dS^T K^T diag(onto)             dY^T = dU^T - (dU^T D) X
//   dS^T = whole dS^T + (dO^T diag(scale into)) Q - (dY^T diag(into beta)) K
#pragma once

#include "ops/linear_attention/cuda/backward_states.cuh"

namespace tilewright::linear_attention::cuda::backward {

template <class T, int kKey, bool kChannel>
struct ReverseShared {
  using All = Tiles<T, kKey>;
  // Of a stage. Keys that read the state, and keys that write to it: with a decay a token the same.
  static constexpr int kKeys = 0;
  static constexpr int kWriters = kChannel ? kKeys + All::Keys::kBytes : kKeys;
  static constexpr int kQueries = kWriters + All::Keys::kBytes;
  static constexpr int kAttention = kQueries + All::Keys::kBytes;
  static constexpr int kInverse = kAttention + All::Pairs::kBytes;
  static constexpr int kDOut = kInverse + All::Pairs::kBytes;
  static constexpr int kFactors = kDOut + All::Values::kBytes;
  static constexpr int kStageBytes = kFactors + kFactorBytes;
  static_assert(kStageBytes % 1024 == 0, "tiles start at multiples of 1024 bytes");
  // Behind the stages.
  static constexpr int kState = kStages * kStageBytes;
  static constexpr int kErrors = kState + All::State::kBytes;
  static constexpr int kRing = kErrors + All::Values::kBytes;
  static constexpr int kBytes = kRing + static_cast<int>(sizeof(Ring));
};

template <class T, int kKey, bool kDelta, bool kChannel>
TILEWRIGHT_DEVICE void load_reverse_stages(const Params& params, const Column& at, char* shared, Ring& ring) {
  using Shared = ReverseShared<T, kKey, kChannel>;
  using All = Tiles<T, kKey>;
  const ChunkBackward& p = params.p;
  const int key_head = at.head / (p.value_heads / p.heads);
  hopper::PipelineState<kStages> state;
  for (int c = at.chunks - 1; c >= 0; --c, state.advance()) {
    char* stage = shared + state.stage * Shared::kStageBytes;
    Barrier& full = ring.full[state.stage];
    hopper::wait(ring.empty[state.stage], state.phase ^ 1);
    hopper::arrive_expect(full, (kChannel ? 3 : 2) * All::Keys::kBytes + All::Values::kBytes + All::Pairs::kBytes +
                                    kFactorBytes + (kDelta ? All::Pairs::kBytes : 0));
    const int64_t pair = pair_of(p, at.sequence.place + c, at.head), token = at.token(c), batch = at.sequence.batch;
    load_rows<typename All::Values>(stage + Shared::kDOut, params.d_out, full, at.slice * kSlice, at.head, token,
                                    batch);
    hopper::load_bulk(stage + Shared::kAttention, pairs_of(p.attention, pair), All::Pairs::kBytes, full);
    if constexpr (kChannel) {
      hopper::load_bulk(stage + Shared::kWriters, keys_of(p.keys_onto, pair), All::Keys::kBytes, full);
      hopper::load_bulk(stage + Shared::kKeys, keys_of(p.keys_into, pair), All::Keys::kBytes, full);
      hopper::load_bulk(stage + Shared::kQueries, keys_of(p.queries_into, pair), All::Keys::kBytes, full);
    } else {
      load_rows<typename All::Keys>(stage + Shared::kKeys, params.k, full, 0, key_head, token, batch);
      load_rows<typename All::Keys>(stage + Shared::kQueries, params.q, full, 0, key_head, token, batch);
    }
    if constexpr (kDelta) {
      hopper::load_bulk(stage + Shared::kInverse, pairs_of(p.inverse, pair), All::Pairs::kBytes, full);
    }
    hopper::load_bulk(stage + Shared::kFactors, factors_of(p.factors, pair), kFactorBytes, full);
  }
}

// dO^T as the register operand [64 columns, 64 tokens].
template <class T, int kKey>
TILEWRIGHT_DEVICE void load_d_out(char* tile, int thread, uint32_t (&a)[kChunk / 16][4]) {
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    hopper::ldmatrix_x4_transposed(a[step], across<typename Tiles<T, kKey>::Values>(tile, thread, step));
  }
}

// Times scale into, by token.
template <class T, class F>
TILEWRIGHT_DEVICE void scale_d_out(const F& f, float scale, int thread, uint32_t (&a)[kChunk / 16][4]) {
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 into = f.intos(hopper::accumulator_col(thread, 8 * step + 4 * half));
#pragma unroll
      for (int j = 2 * half; j < 2 * half + 2; ++j) {
        float low, high;
        hopper::unpack_pair<T>(a[step][j], low, high);
        a[step][j] = hopper::pack_pair<T>(scale * into.x * low, scale * into.y * high);
      }
    }
  }
}

// d = dO^T P.
template <class T, int kKey>
TILEWRIGHT_DEVICE void through_attention(const uint32_t (&d_out)[kChunk / 16][4], char* attention,
                                         float (&d)[kChunk / 2]) {
  using Pairs = typename Tiles<T, kKey>::Pairs;
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    hopper::Wgmma<T, T, kChunk, hopper::Major::kK, hopper::Major::kMN>::run(
        d, d_out[step], Pairs::mn_major(attention, 16 * step, 0), step > 0);
  }
}

// d = dO^T P becomes dU^T = dO^T P + dS^T K^T diag(onto); zero where there is no token.
template <class F>
TILEWRIGHT_DEVICE void add_through_state(const F& f, const float (&through_state)[kChunk / 2], int rows, int thread,
                                         float (&d)[kChunk / 2]) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; i += 4) {
    const int token = hopper::accumulator_col(thread, i);
    const float2 onto = f.ontos(token);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const float factor = x % 2 == 0 ? onto.x : onto.y;
      d[i + x] = token + x % 2 < rows ? d[i + x] + factor * through_state[i + x] : 0.0f;
    }
  }
}

// Starts d = dU^T becoming dY^T = dU^T - (dU^T D) X.
template <class T, int kKey, class F>
TILEWRIGHT_DEVICE void start_solving(const F& f, char* inverse, int thread, uint32_t (&a)[kChunk / 16][4],
                                     float (&d)[kChunk / 2]) {
  using Pairs = typename Tiles<T, kKey>::Pairs;
  float scaled[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk / 2; i += 4) {
    const float2 beta = f.betas(hopper::accumulator_col(thread, i));
#pragma unroll
    for (int x = 0; x < 4; ++x) scaled[i + x] = -(x % 2 == 0 ? beta.x : beta.y) * d[i + x];
  }
  fragments<T>(scaled, a);
  hopper::keep(d);
  hopper::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    hopper::Wgmma<T, T, kChunk, hopper::Major::kK, hopper::Major::kMN>::run(
        d, a[step], Pairs::mn_major(inverse, 16 * step, 0), true);
  }
  hopper::wgmma_commit();
}

// Starts dS^T = whole dS^T + (dO^T diag(scale into)) Q. It runs while dY is made ready.
template <class T, int kKey, class F>
TILEWRIGHT_DEVICE void start_reading(const F& f, float scale, char* queries, int thread,
                                     uint32_t (&d_out)[kChunk / 16][4], float (&d_state)[kKey / 2]) {
  scale_d_out<T>(f, scale, thread, d_out);
  decay_state(f, thread, d_state);
  hopper::keep(d_state);
  hopper::wgmma_fence();
  write_state<T, kKey>(d_out, queries, d_state);
  hopper::wgmma_commit();
}

// dS^T -= (dY^T diag(into beta)) K.
template <class T, int kKey, class F>
TILEWRIGHT_DEVICE void start_writing(const F& f, char* keys, int thread, float (&d_errors)[kChunk / 2],
                                     uint32_t (&a)[kChunk / 16][4], float (&d_state)[kKey / 2]) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; i += 4) {
    const int token = hopper::accumulator_col(thread, i);
    const float2 into = f.intos(token), beta = f.betas(token);
#pragma unroll
    for (int x = 0; x < 4; ++x) d_errors[i + x] *= x % 2 == 0 ? -into.x * beta.x : -into.y * beta.y;
  }
  fragments<T>(d_errors, a);
  hopper::wgmma_fence();
  write_state<T, kKey>(a, keys, d_state);
  hopper::wgmma_commit();
}

template <class T, int kKey, bool kDelta, bool kChannel>
TILEWRIGHT_DEVICE void sweep_reverse(const ChunkBackward& p, const Column& at, char* shared, Ring& ring) {
  using Shared = ReverseShared<T, kKey, kChannel>;
  using All = Tiles<T, kKey>;
  const int thread = static_cast<int>(threadIdx.x);
  float d_state[kKey / 2];
  load_state(p, at, p.d_final_state, at.n, thread, d_state);
  hopper::PipelineState<kStages> turn;
  for (int c = at.chunks - 1; c >= 0; --c, turn.advance()) {
    char* stage = shared + turn.stage * Shared::kStageBytes;
    const SweepFactors<kChannel> f{reinterpret_cast<const float*>(stage + Shared::kFactors)};
    const int64_t pair = pair_of(p, at.sequence.place + c, at.head);
    const int rows = at.rows(c);
    uint32_t behind[kKey / 16][4], d_out[kChunk / 16][4], solving[kChunk / 16][4], writing[kChunk / 16][4];
    float d_errors[kChunk / 2], through_state[kChunk / 2];
    fragments<T>(d_state, behind);
    stage_state<T, kKey>(behind, shared + Shared::kState, thread);
    hopper::wait(ring.full[turn.stage], turn.phase);
    if constexpr (!kChannel) {
      clear_tail<typename All::Keys>(stage + Shared::kKeys, rows, thread);
      clear_tail<typename All::Keys>(stage + Shared::kQueries, rows, thread);
    }
    clear_tail<typename All::Values>(stage + Shared::kDOut, rows, thread);
    load_d_out<T, kKey>(stage + Shared::kDOut, thread, d_out);
    hopper::wgmma_fence();
    read_state<T, kKey>(behind, stage + Shared::kWriters, through_state);
    through_attention<T, kKey>(d_out, stage + Shared::kAttention, d_errors);
    hopper::wgmma_commit();
    send(slice_of(p, p.d_states, pair, at.slice, kKey), shared + Shared::kState, All::State::kBytes, thread);
    hopper::wgmma_wait<0>();
    hopper::keep(through_state);
    hopper::keep(d_errors);
    add_through_state(f, through_state, rows, thread, d_errors);
    if constexpr (kDelta) start_solving<T, kKey>(f, stage + Shared::kInverse, thread, solving, d_errors);
    start_reading<T, kKey>(f, kChannel ? 1.0f : p.scale, stage + Shared::kQueries, thread, d_out, d_state);
    if constexpr (kDelta) {
      hopper::wgmma_wait<1>();
      hopper::keep(d_errors);
    }
    stage_rows<T, kKey>(d_errors, shared + Shared::kErrors, thread);
    if constexpr (kDelta) start_writing<T, kKey>(f, stage + Shared::kKeys, thread, d_errors, writing, d_state);
    send(slice_of(p, p.d_errors, pair, at.slice, kSlice), shared + Shared::kErrors, All::Values::kBytes, thread);
    hopper::wgmma_wait<0>();
    hopper::keep(d_state);
    release(ring.empty[turn.stage]);
  }
  if (thread == 0) hopper::store_wait<0>();
  store_state(p, at, p.d_initial_state, at.n, thread, d_state);
}

// Both sweeps at once: neither needs the other, and a few heads alone would leave most of the device idle. The first half
// of the blocks goes backwards, which takes longer.
template <class T, int kKey, bool kDelta, bool kChannel>
__global__ void __launch_bounds__(kSweepThreads, 1) sweeps_kernel(const __grid_constant__ Params params) {
  char* shared = hopper::shared_memory();
  const int64_t columns = gridDim.x / 2;
  const bool reverse = blockIdx.x < columns;
  auto& ring = *reinterpret_cast<Ring*>(
      shared + (reverse ? ReverseShared<T, kKey, kChannel>::kRing : StatesShared<T, kKey, kChannel>::kRing));
  const Column at = column_of(params.p, reverse ? blockIdx.x : blockIdx.x - columns);
  if (threadIdx.x == 0) ring.start();
  __syncthreads();
  if (threadIdx.x > kGroup) return;
  if (threadIdx.x == kGroup) {
    reverse ? load_reverse_stages<T, kKey, kDelta, kChannel>(params, at, shared, ring)
            : load_states_stages<T, kKey, kDelta, kChannel>(params, at, shared, ring);
  } else if (reverse) {
    sweep_reverse<T, kKey, kDelta, kChannel>(params.p, at, shared, ring);
  } else {
    sweep_states<T, kKey, kDelta, kChannel>(params.p, at, shared, ring);
  }
}

}  // namespace tilewright::linear_attention::cuda::backward
