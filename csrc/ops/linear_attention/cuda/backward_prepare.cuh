// SPDX-License-Identifier: Apache-2.0
// One chunk of a key head, its value heads one after the other: running sums of g, P, and X = A (I + D A)^-1. A block is a
// warpgroup; Q K^T and K K^T stay in its registers, and what they were made of makes room for the solve.
//
// X is solved in float32: X = A - A D X row by row, so that row i needs the rows above it. Warp w has columns 16 w to
// 16 w + 15, each of them two lanes, of which one has the upper and one the lower half of 16 rows.
#pragma once

#include <algorithm>

#include "ops/linear_attention/cuda/backward_tiles.cuh"

namespace tilewright::linear_attention::cuda::backward {

// A decay whose exponential is 0; a longer way down would cost the tokens after it their precision.
inline constexpr float kLeastLog = -110.0f;
inline constexpr float kLog2E = 1.4426950408889634f;

template <class T, int kKey>
struct PrepareShared {
  using All = Tiles<T, kKey>;
  static constexpr int kLeading = kChunk + 4;  // floats: 16-byte rows, and no two rows of 8 in one bank
  static constexpr int kKeys = 0;
  static constexpr int kQueries = kKeys + All::Keys::kBytes;
  static constexpr int kPairs = 0;  // A, transposed
  static constexpr int kScaled = kPairs + kChunk * kLeading * 4;  // D X
  static constexpr int kWorkBytes =
      (std::max(kScaled + kChunk * kChunk * 4, kQueries + All::Keys::kBytes) + 1023) & ~1023;
  static constexpr int kAttention = kWorkBytes;
  static constexpr int kInverse = kAttention + All::Pairs::kBytes;
  static constexpr int kFactors = kInverse + All::Pairs::kBytes;
  static constexpr int kBarrier = kFactors + kFactorBytes;
  static constexpr int kBytes = kBarrier + 16;
};

// Threads 0 to 63: a token each. The second warp adds the first one's sum.
TILEWRIGHT_DEVICE void make_factors(const ChunkBackward& p, const Chunk& chunk, int head, float* factors) {
  const int i = static_cast<int>(threadIdx.x);
  const bool token = i < chunk.rows;
  float sum = 0.0f;
  if (i < kChunk) {
    if (token && p.decay != Decay::kNone) {
      const float log = p.g.data[chunk.batch * p.g.batch + (chunk.first + i) * p.g.token + head * p.g.head];
      sum = log < kLeastLog ? kLeastLog * kLog2E : log * kLog2E;
    }
    for (int step = 1; step < 32; step *= 2) {
      const float before = __shfl_up_sync(0xffffffffu, sum, step);
      if (i % 32 >= step) sum += before;
    }
    factors[i] = sum;
    float beta = 1.0f;
    if (p.rule == Rule::kDelta) {
      beta = token ? p.beta.data[chunk.batch * p.beta.batch + (chunk.first + i) * p.beta.token + head * p.beta.head]
                   : 0.0f;
    }
    factors[3 * kChunk + i] = beta;
  }
  __syncthreads();
  const float first_half = factors[31];
  const float total = first_half + factors[kChunk - 1];
  __syncthreads();
  if (i < kChunk) {
    if (i >= 32) sum += first_half;
    factors[i] = sum;
    factors[kChunk + i] = exp2f(sum);
    factors[2 * kChunk + i] = exp2f(total - sum);
  }
  __syncthreads();
}

template <class T, int kKey>
TILEWRIGHT_DEVICE void multiply_keys(char* rows, char* keys, float (&d)[kChunk / 2]) {
  using Keys = typename Tiles<T, kKey>::Keys;
#pragma unroll
  for (int step = 0; step < kKey / 16; ++step) {
    hopper::Wgmma<T, T, kChunk>::run(d, Keys::k_major(rows, 0, 16 * step), Keys::k_major(keys, 0, 16 * step), step > 0);
  }
}

// P = scale Q K^T with decays, on and below the diagonal, as a tile; A, below it, transposed.
template <class T, int kKey, bool kDelta>
TILEWRIGHT_DEVICE void store_products(float scale, const Factors& f, int rows, const float (&attention)[kChunk / 2],
                                      const float (&pairs)[kChunk / 2], char* tile, float* transposed) {
  constexpr int kLeading = PrepareShared<T, kKey>::kLeading;
  const int thread = fresh_thread();
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    float scores[8];
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      const int r = 8 * step + x, i = hopper::accumulator_row(thread, r), j = hopper::accumulator_col(thread, r);
      const float decay = i < rows && j <= i ? exp2f(f.log(i) - f.log(j)) : 0.0f;
      scores[x] = i < rows && j <= i ? scale * attention[r] * decay : 0.0f;
      if constexpr (kDelta) transposed[j * kLeading + i] = i < rows && j < i ? pairs[r] * decay : 0.0f;
    }
    uint32_t words[4];
    fragment<T>(scores, 0, words);
    hopper::stmatrix_x4(along<typename Tiles<T, kKey>::Pairs>(tile, thread, step), words);
  }
}

// Rows 16 block to 16 block + 15 of this lane's column; x: its 8 of them.
template <int kLeading, class F>
TILEWRIGHT_DEVICE void solve_rows(const float* pairs, float* scaled, const F& f, int block, float (&x)[8]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, first = static_cast<int>(threadIdx.x) / 32 * 16;
  const int column = first + lane % 16, half = lane / 16, row = 16 * block + 8 * half;
#pragma unroll
  for (int r = 0; r < 8; ++r) x[r] = pairs[column * kLeading + row + r];
#pragma unroll 4
  for (int k = first; k < 16 * block; ++k) {
    const float above = scaled[k * kChunk + column];
#pragma unroll
    for (int r = 0; r < 8; ++r) x[r] -= pairs[k * kLeading + row + r] * above;
  }
#pragma unroll 1
  for (int owner = 0; owner < 2; ++owner) {
    const int above_row = 16 * block + 8 * owner;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float above = f.beta(above_row + k) * __shfl_sync(0xffffffffu, x[k], lane % 16 + 16 * owner);
#pragma unroll
      for (int r = 0; r < 8; ++r) x[r] -= pairs[(above_row + k) * kLeading + row + r] * above;
    }
  }
#pragma unroll
  for (int r = 0; r < 8; ++r) scaled[(row + r) * kChunk + column] = f.beta(row + r) * x[r];
  __syncwarp();
}

template <class T, int kKey, class F>
TILEWRIGHT_DEVICE void solve(const float* pairs, float* scaled, const F& f, char* tile) {
  using Shared = PrepareShared<T, kKey>;
  using Pairs = typename Tiles<T, kKey>::Pairs;
  const int lane = fresh_thread() % 32, warp = fresh_thread() / 32;
  for (int block = 0; block < kChunk / 16; ++block) {
    float x[8] = {};
    if (block >= warp) solve_rows<Shared::kLeading>(pairs, scaled, f, block, x);
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      *Pairs::at(static_cast<void*>(tile), 16 * block + 8 * (lane / 16) + r, 16 * warp + lane % 16) =
          hopper::from_float<T>(x[r]);
    }
  }
}

// Q K^T and K K^T.
template <class T, int kKey, bool kDelta>
TILEWRIGHT_DEVICE void multiply_rows(char* shared, float (&attention)[kChunk / 2], float (&pairs)[kChunk / 2]) {
  using Shared = PrepareShared<T, kKey>;
  hopper::wgmma_fence();
  multiply_keys<T, kKey>(shared + Shared::kQueries, shared + Shared::kKeys, attention);
  if constexpr (kDelta) multiply_keys<T, kKey>(shared + Shared::kKeys, shared + Shared::kKeys, pairs);
  hopper::wgmma_commit();
  hopper::wgmma_wait<0>();
  hopper::keep(attention);
  if constexpr (kDelta) hopper::keep(pairs);
}

template <class T, int kKey, bool kDelta>
TILEWRIGHT_DEVICE void prepare_head(const ChunkBackward& p, const Chunk& chunk, int64_t pair, char* shared,
                                    const float (&attention)[kChunk / 2], const float (&pairs)[kChunk / 2]) {
  using Shared = PrepareShared<T, kKey>;
  constexpr int kTile = Tiles<T, kKey>::Pairs::kBytes;
  auto* factors = reinterpret_cast<float*>(shared + Shared::kFactors);
  auto* transposed = reinterpret_cast<float*>(shared + Shared::kPairs);
  const Factors f{factors};
  store_products<T, kKey, kDelta>(p.scale, f, chunk.rows, attention, pairs, shared + Shared::kAttention, transposed);
  if constexpr (kDelta) {
    __syncthreads();
    solve<T, kKey>(transposed, reinterpret_cast<float*>(shared + Shared::kScaled), f, shared + Shared::kInverse);
  }
  hopper::fence_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    hopper::store_bulk(factors_of(p.factors, pair), factors, kFactorBytes);
    hopper::store_bulk(pairs_of(p.attention, pair), shared + Shared::kAttention, kTile);
    if constexpr (kDelta) hopper::store_bulk(pairs_of(p.inverse, pair), shared + Shared::kInverse, kTile);
    hopper::store_commit();
    hopper::store_wait<0>();
  }
  __syncthreads();
}

template <class T, int kKey, bool kDelta>
__global__ void __launch_bounds__(kGroup, 3) prepare_kernel(const __grid_constant__ Params params) {
  using Shared = PrepareShared<T, kKey>;
  using All = Tiles<T, kKey>;
  const ChunkBackward& p = params.p;
  char* shared = hopper::shared_memory();
  auto& barrier = *reinterpret_cast<Barrier*>(shared + Shared::kBarrier);
  const int key_head = static_cast<int>(blockIdx.x % p.heads), group = p.value_heads / p.heads;
  const int64_t place = blockIdx.x / p.heads;
  const Chunk chunk = chunk_at(p.sequences, place);
  if (chunk.rows == 0) return;
  if (threadIdx.x == 0) {
    hopper::init(barrier, 1);
    hopper::fence_barrier_init();
    hopper::arrive_expect(barrier, 2 * All::Keys::kBytes);
    load_rows<typename All::Keys>(shared + Shared::kKeys, params.k, barrier, 0, key_head, chunk.first, chunk.batch);
    load_rows<typename All::Keys>(shared + Shared::kQueries, params.q, barrier, 0, key_head, chunk.first, chunk.batch);
  }
  auto* factors = reinterpret_cast<float*>(shared + Shared::kFactors);
  make_factors(p, chunk, key_head * group, factors);  // its barriers show the initialised one to all
  hopper::wait(barrier, 0);
  float attention[kChunk / 2], pairs[kChunk / 2];
  multiply_rows<T, kKey, kDelta>(shared, attention, pairs);
  __syncthreads();
  for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
    if (head > key_head * group) make_factors(p, chunk, head, factors);
    prepare_head<T, kKey, kDelta>(p, chunk, pair_of(p, place, head), shared, attention, pairs);
  }
}

}  // namespace tilewright::linear_attention::cuda::backward
