// SPDX-License-Identifier: Apache-2.0
// The gradient's first kernel where every channel of the keys has a decay: one chunk of a value head, a warpgroup.
//
// Decays sit inside the products' sums, P_ij = scale sum_d q_id k_jd exp(G_id - G_jd). Warp w has rows 16 w to 16 w + 15.
// Left of its square on the diagonal both operands are scaled by what they lose to and from the token before these rows, so
// that no factor exceeds 1; on the diagonal every pair has exponentials of its own.
#pragma once

#include "ops/linear_attention/cuda/backward_prepare.cuh"

namespace tilewright::linear_attention::cuda::backward {

inline constexpr int kSquare = 16;

template <class T, int kKey>
struct ChannelPrepareShared {
  using All = Tiles<T, kKey>;
  static constexpr int kLeading = PrepareShared<T, kKey>::kLeading;
  static constexpr int kSumLeading = kKey + 4;
  static constexpr int kKeys = 0;
  static constexpr int kQueries = kKeys + All::Keys::kBytes;
  static constexpr int kAttention = kQueries + All::Keys::kBytes;
  static constexpr int kInverse = kAttention + All::Pairs::kBytes;
  static constexpr int kFactors = kInverse + All::Pairs::kBytes;
  static constexpr int kSums = kFactors + kFactorBytes;
  static constexpr int kPairs = kSums + kChunk * kSumLeading * 4;
  static constexpr int kBarrier = kPairs + kChunk * kLeading * 4;
  static constexpr int kBytes = kBarrier + 16;
  static constexpr int kScaled = kQueries;  // once all products are made
  static_assert(kChunk * kChunk * 4 <= All::Keys::kBytes, "what the solve scales fits where the queries were");
};

// Running sums of g in base 2 by token and channel; behind the chunk's end they stay what they were.
template <int kKey>
struct ChannelSums {
  static constexpr int kLeading = kKey + 4;
  float* at;

  TILEWRIGHT_DEVICE float operator()(int token, int channel) const { return at[token * kLeading + channel]; }

  // 2 to the difference of two tokens' sums, the later one first: at most 1.
  TILEWRIGHT_DEVICE float decay(int later, int earlier, int channel) const {
    return exp2f(at[later * kLeading + channel] - at[earlier * kLeading + channel]);
  }

  TILEWRIGHT_DEVICE void load(const ChunkBackward& p, const Chunk& chunk, int head) const {
    const int channel = static_cast<int>(threadIdx.x);
    if (channel >= kKey) return;
    const float* g = p.g.data + chunk.batch * p.g.batch + chunk.first * p.g.token + head * p.g.head + channel;
    float sum = 0.0f;
#pragma unroll 16
    for (int t = 0; t < kChunk; ++t) {
      if (t < chunk.rows && channel < p.key_size) {
        const float log = g[t * p.g.token];
        sum += log < kLeastLog ? kLeastLog * kLog2E : log * kLog2E;
      }
      at[t * kLeading + channel] = sum;
    }
  }
};

// exp(G_n) by channel, and beta.
template <int kKey>
TILEWRIGHT_DEVICE void make_channel_factors(const ChunkBackward& p, const Chunk& chunk, int head,
                                            const ChannelSums<kKey>& sums, float* factors) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < kKey) factors[i] = exp2f(sums(kChunk - 1, i));
  for (int t = i; t < kChunk; t += kGroup) {
    float beta = 1.0f;
    if (p.rule == Rule::kDelta) {
      beta = t < chunk.rows
                 ? p.beta.data[chunk.batch * p.beta.batch + (chunk.first + t) * p.beta.token + head * p.beta.head]
                 : 0.0f;
    }
    factors[3 * kChunk + t] = beta;
    factors[2 * kChunk + t] = 1.0f;
  }
}

// Two adjacent channels of a row.
template <class T, int kKey>
TILEWRIGHT_DEVICE void two_channels(const char* tile, int row, int channel, float& low, float& high) {
  hopper::unpack_pair<T>(*reinterpret_cast<const uint32_t*>(tile + Tiles<T, kKey>::Keys::offset(row, channel)), low,
                         high);
}

template <class T, int kKey>
TILEWRIGHT_DEVICE uint32_t decayed(const char* tile, int row, int channel, const ChannelSums<kKey>& sums, int later,
                                   int earlier) {
  float low, high;
  two_channels<T, kKey>(tile, row, channel, low, high);
  return hopper::pack_pair<T>(low * sums.decay(later, earlier, channel),
                              high * sums.decay(later, earlier, channel + 1));
}

// k exp(G), k exp(G_n - G) and scale q exp(G), as the sweeps read them: images of tiles, 16 bytes at a time.
template <class T, int kKey>
TILEWRIGHT_DEVICE void store_decayed_rows(const ChunkBackward& p, int64_t pair, const char* keys, const char* queries,
                                          const ChannelSums<kKey>& sums) {
  using Keys = typename Tiles<T, kKey>::Keys;
  char* into = reinterpret_cast<char*>(keys_of(p.keys_into, pair));
  char* onto = reinterpret_cast<char*>(keys_of(p.keys_onto, pair));
  char* reading = reinterpret_cast<char*>(keys_of(p.queries_into, pair));
  for (int i = static_cast<int>(threadIdx.x); i < kChunk * kKey / 8; i += kGroup) {
    const int row = i / (kKey / 8), channel = i % (kKey / 8) * 8;
    const uint32_t at = Keys::offset(row, channel);
    uint32_t a[4], b[4], c[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int d = channel + 2 * x;
      const float low_into = exp2f(sums(row, d)), high_into = exp2f(sums(row, d + 1));
      const float low_onto = sums.decay(kChunk - 1, row, d), high_onto = sums.decay(kChunk - 1, row, d + 1);
      float low, high;
      two_channels<T, kKey>(keys, row, d, low, high);
      a[x] = hopper::pack_pair<T>(low * low_into, high * high_into);
      b[x] = hopper::pack_pair<T>(low * low_onto, high * high_onto);
      two_channels<T, kKey>(queries, row, d, low, high);
      c[x] = hopper::pack_pair<T>(p.scale * low * low_into, p.scale * high * high_into);
    }
    hopper::store_16(into + at, {a[0], a[1], a[2], a[3]});
    hopper::store_16(onto + at, {b[0], b[1], b[2], b[3]});
    hopper::store_16(reading + at, {c[0], c[1], c[2], c[3]});
  }
}

// Where products go: P as a tile, A transposed and in float32.
template <class T, int kKey, bool kDelta>
struct ChannelProducts {
  using Pairs = typename Tiles<T, kKey>::Pairs;
  char* attention;
  float* pairs;
  float scale;

  TILEWRIGHT_DEVICE void put(int row, int column, float qk, float kk) const {
    *Pairs::at(static_cast<void*>(attention), row, column) = hopper::from_float<T>(scale * qk);
    if (kDelta && column < row) pairs[column * PrepareShared<T, kKey>::kLeading + row] = kk;
  }
};

// By warp w: its 16 rows, all columns left of them.
template <class T, int kKey, bool kDelta>
TILEWRIGHT_DEVICE void multiply_left(const char* keys, const char* queries, const ChannelSums<kKey>& sums,
                                     const ChannelProducts<T, kKey, kDelta>& to) {
  constexpr int kMaxTiles = (kChunk - kSquare) / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32, first = static_cast<int>(threadIdx.x) / 32 * kSquare;
  const int across = lane / 4, along = lane % 4 * 2, before = first - 1;
  if (first == 0) return;
  float qk[kMaxTiles][4] = {}, kk[kMaxTiles][4] = {};
#pragma unroll 1
  for (int k = 0; k < kKey; k += 16) {
    uint32_t q[4], rows[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int row = first + across + w % 2 * 8, channel = k + along + w / 2 * 8;
      q[w] = decayed<T, kKey>(queries, row, channel, sums, row, before);
      rows[w] = decayed<T, kKey>(keys, row, channel, sums, row, before);
    }
#pragma unroll
    for (int tile = 0; tile < kMaxTiles; ++tile) {
      if (8 * tile >= first) break;
      const int row = 8 * tile + across;
      const uint32_t b[2] = {decayed<T, kKey>(keys, row, k + along, sums, before, row),
                             decayed<T, kKey>(keys, row, k + along + 8, sums, before, row)};
      hopper::mma_m16n8k16(qk[tile], q, b, T{});
      if constexpr (kDelta) hopper::mma_m16n8k16(kk[tile], rows, b, T{});
    }
  }
#pragma unroll
  for (int tile = 0; tile < kMaxTiles; ++tile) {
    if (8 * tile >= first) break;
#pragma unroll
    for (int r = 0; r < 4; ++r) to.put(first + across + r / 2 * 8, 8 * tile + along + r % 2, qk[tile][r], kk[tile][r]);
  }
}

// By warp w: the square of its 16 rows on the diagonal, four channels a lane.
template <class T, int kKey, bool kDelta>
TILEWRIGHT_DEVICE void multiply_square(const char* keys, const char* queries, const ChannelSums<kKey>& sums,
                                       const ChannelProducts<T, kKey, kDelta>& to) {
  constexpr int kChannels = kKey / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, first = static_cast<int>(threadIdx.x) / 32 * kSquare;
  const int channel = lane * kChannels;
#pragma unroll 1
  for (int i = first; i < first + kSquare; ++i) {
    float q[kChannels], k[kChannels];
#pragma unroll
    for (int d = 0; d < kChannels; d += 2) {
      two_channels<T, kKey>(queries, i, channel + d, q[d], q[d + 1]);
      two_channels<T, kKey>(keys, i, channel + d, k[d], k[d + 1]);
    }
#pragma unroll 4
    for (int j = first; j <= i; ++j) {
      float qk = 0.0f, kk = 0.0f;
#pragma unroll
      for (int d = 0; d < kChannels; d += 2) {
        float x[2];
        two_channels<T, kKey>(keys, j, channel + d, x[0], x[1]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float other = x[e] * sums.decay(i, j, channel + d + e);
          qk += q[d + e] * other;
          if constexpr (kDelta) kk += k[d + e] * other;
        }
      }
      for (int step = 16; step > 0; step /= 2) {
        qk += __shfl_xor_sync(0xffffffffu, qk, step);
        if constexpr (kDelta) kk += __shfl_xor_sync(0xffffffffu, kk, step);
      }
      if (lane == 0) to.put(i, j, qk, kk);
    }
  }
}

template <class T, int kKey, bool kDelta>
TILEWRIGHT_DEVICE void clear_products(const ChannelProducts<T, kKey, kDelta>& to) {
  for (int i = static_cast<int>(threadIdx.x) * 16; i < Tiles<T, kKey>::Pairs::kBytes; i += kGroup * 16) {
    hopper::store_16(to.attention + i, {0, 0, 0, 0});
  }
  for (int i = static_cast<int>(threadIdx.x) * 4; i < kChunk * PrepareShared<T, kKey>::kLeading; i += kGroup * 4) {
    hopper::store_16(to.pairs + i, {0, 0, 0, 0});
  }
}

template <class T, int kKey, bool kDelta>
__global__ void __launch_bounds__(kGroup, 2) prepare_channel_kernel(const __grid_constant__ Params params) {
  using Shared = ChannelPrepareShared<T, kKey>;
  using All = Tiles<T, kKey>;
  const ChunkBackward& p = params.p;
  char* shared = hopper::shared_memory();
  char *keys = shared + Shared::kKeys, *queries = shared + Shared::kQueries;
  auto& barrier = *reinterpret_cast<Barrier*>(shared + Shared::kBarrier);
  auto* factors = reinterpret_cast<float*>(shared + Shared::kFactors);
  const int head = static_cast<int>(blockIdx.x % p.value_heads);
  const int64_t place = blockIdx.x / p.value_heads, pair = pair_of(p, place, head);
  const Chunk chunk = chunk_at(p.sequences, place);
  if (chunk.rows == 0) return;
  if (threadIdx.x == 0) {
    hopper::init(barrier, 1);
    hopper::fence_barrier_init();
    const int key_head = head / (p.value_heads / p.heads);
    hopper::arrive_expect(barrier, 2 * All::Keys::kBytes);
    load_rows<typename All::Keys>(keys, params.k, barrier, 0, key_head, chunk.first, chunk.batch);
    load_rows<typename All::Keys>(queries, params.q, barrier, 0, key_head, chunk.first, chunk.batch);
  }
  const ChannelSums<kKey> sums{reinterpret_cast<float*>(shared + Shared::kSums)};
  const ChannelProducts<T, kKey, kDelta> products{shared + Shared::kAttention,
                                                  reinterpret_cast<float*>(shared + Shared::kPairs), p.scale};
  sums.load(p, chunk, head);
  clear_products(products);
  __syncthreads();
  make_channel_factors<kKey>(p, chunk, head, sums, factors);
  hopper::wait(barrier, 0);
  if (chunk.rows < kChunk) {
    clear_rows<typename All::Keys>(keys, chunk.rows, static_cast<int>(threadIdx.x), kGroup);
    clear_rows<typename All::Keys>(queries, chunk.rows, static_cast<int>(threadIdx.x), kGroup);
  }
  __syncthreads();
  store_decayed_rows<T, kKey>(p, pair, keys, queries, sums);
  multiply_left<T, kKey, kDelta>(keys, queries, sums, products);
  multiply_square<T, kKey, kDelta>(keys, queries, sums, products);
  __syncthreads();
  if constexpr (kDelta) {
    solve<T, kKey>(products.pairs, reinterpret_cast<float*>(shared + Shared::kScaled), ChannelFactors{factors},
                   shared + Shared::kInverse);
  }
  hopper::fence_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    hopper::store_bulk(factors_of(p.factors, pair), factors, kFactorBytes);
    hopper::store_bulk(pairs_of(p.attention, pair), products.attention, All::Pairs::kBytes);
    if constexpr (kDelta) {
      hopper::store_bulk(pairs_of(p.inverse, pair), shared + Shared::kInverse, All::Pairs::kBytes);
    }
    hopper::store_commit();
    hopper::store_wait<0>();
  }
}

}  // namespace tilewright::linear_attention::cuda::backward
