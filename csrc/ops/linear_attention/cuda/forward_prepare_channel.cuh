// SPDX-License-Identifier: Apache-2.0
// The chunk form's first kernel where every channel of the keys has a decay of its own: one block for each chunk and
// value head. The decays sit inside the products' sums,
//
//   scores_ij = scale beta_j sum_d q_id k_jd exp(G_id - G_jd)
//
// so products are made in squares. Left of the diagonal both operands are scaled by what they lose to and from the token
// before the square's rows, G_i - G_r and G_r - G_j, neither above 0: 16 rows by all columns before them, then the second
// 8 of these rows by the first 8. In the squares of 8 tokens on the diagonal there is no such token, and every pair has
// exponentials of its own.
#pragma once

#include "ops/linear_attention/cuda/forward_prepare.cuh"

namespace tilewright::linear_attention::cuda {
namespace prepare {

inline constexpr int kSquare = 16;

template <class In, int kKeys>
struct ChannelLayout {
  // Rows of sums are padded, so that a column of them lies in different banks.
  static constexpr int kSumStride = kKeys + 4;
  static constexpr int kK = 0;
  static constexpr int kQ = kK + Keys<In, kKeys>::kBytes;
  static constexpr int kScores = kQ + Keys<In, kKeys>::kBytes;
  static constexpr int kInverse = kScores + kSquareBytes;
  static constexpr int kMatrix = kInverse + kSquareBytes;
  static constexpr int kSums = kMatrix + kMatrixFloats * 4;
  static constexpr int kBeta = kSums + kChunk * kSumStride * 4;
  static constexpr int kBytes = kBeta + kChunk * 4;
};

template <class In, int kKeys, bool kDelta>
struct ChannelBlock {
  using At = ChannelLayout<In, kKeys>;
  using Tile = Keys<In, kKeys>;

  const PrepareParams<In>& params;
  const Chunk& chunk;
  const int64_t head, index;
  char* shared;

  TILEWRIGHT_DEVICE float* sums(int row) const {
    return reinterpret_cast<float*>(shared + At::kSums) + row * At::kSumStride;
  }
  TILEWRIGHT_DEVICE float* beta() const { return reinterpret_cast<float*>(shared + At::kBeta); }

  // Running sums of log2 decays, a channel a thread; behind the chunk's end they stay what they were.
  TILEWRIGHT_DEVICE void load_sums() const {
    const Problem<In, float>& p = params.problem;
    const int channel = static_cast<int>(threadIdx.x);
    if (channel < kKeys) {
      float sum = 0.0f;
#pragma unroll 16
      for (int t = 0; t < kChunk; ++t) {
        if (t < chunk.rows && channel < p.key_size) {
          sum += bounded_log2(p.g.row(chunk.batch, chunk.first + t, head)[channel]);
        }
        sums(t)[channel] = sum;
      }
      params.to.row(index)[kChunk + channel] = exp2f(sum);
    }
    if (threadIdx.x < kChunk) {
      const int t = static_cast<int>(threadIdx.x);
      float value = t < chunk.rows ? 1.0f : 0.0f;
      if (kDelta && t < chunk.rows) value = p.beta.row(chunk.batch, chunk.first + t, head)[0];
      beta()[t] = value;
      params.to.row(index)[t] = value;
    }
  }

  // Everything above the diagonal, among others.
  TILEWRIGHT_DEVICE void clear_products() const {
    constexpr hopper::U128 kZero{0, 0, 0, 0};
    for (int i = static_cast<int>(threadIdx.x) * 16; i < kSquareBytes; i += kPrepareThreads * 16) {
      hopper::store_16(shared + At::kScores + i, kZero);
    }
    if constexpr (kDelta) {
      for (int i = static_cast<int>(threadIdx.x) * 16; i < kMatrixFloats * 4; i += kPrepareThreads * 16) {
        hopper::store_16(shared + At::kMatrix + i, kZero);
      }
    }
  }

  // Two adjacent channels of a row of Q or K.
  TILEWRIGHT_DEVICE void pair(int tile, int row, int channel, float (&x)[2]) const {
    const auto word = *reinterpret_cast<const uint32_t*>(Tile::at(shared + tile, row, channel));
    hopper::unpack_pair<In>(word, x[0], x[1]);
  }

  // 2^(sums of row `to` - sums of row `from`) for two adjacent channels.
  TILEWRIGHT_DEVICE void decays(int to, int from, int channel, float (&x)[2]) const {
    x[0] = exp2f(sums(to)[channel] - sums(from)[channel]);
    x[1] = exp2f(sums(to)[channel + 1] - sums(from)[channel + 1]);
  }

  TILEWRIGHT_DEVICE void put(int row, int column, float qk, float kk) const {
    const float weight = beta()[column];
    *Square<In>::at(shared + At::kScores, row, column) = hopper::from_float<In>(params.problem.scale * qk * weight);
    if (kDelta && row > column) {
      reinterpret_cast<float*>(shared + At::kMatrix)[column * kMatrixStride + row] = kk * weight;
    }
  }

  // By one warp: 16 rows from `first` on, all columns left of their square on the diagonal.
  TILEWRIGHT_DEVICE void multiply_left(int first) const {
    constexpr int kMaxBlocks = (kChunk - kSquare) / 8;
    if (first == 0) return;
    const int lane = static_cast<int>(threadIdx.x) % 32, across = lane / 4, along = lane % 4 * 2, before = first - 1;
    float qk[kMaxBlocks][4] = {}, kk[kMaxBlocks][4] = {};
    for (int k = 0; k < kKeys; k += 16) {
      uint32_t q[4], rows[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int row = first + across + w % 2 * 8, channel = k + along + w / 2 * 8;
        float x[2], decay[2];
        decays(row, before, channel, decay);
        pair(At::kQ, row, channel, x);
        q[w] = hopper::pack_pair<In>(x[0] * decay[0], x[1] * decay[1]);
        if constexpr (!kDelta) continue;
        pair(At::kK, row, channel, x);
        rows[w] = hopper::pack_pair<In>(x[0] * decay[0], x[1] * decay[1]);
      }
#pragma unroll
      for (int block = 0; block < kMaxBlocks; ++block) {
        if (8 * block >= first) continue;
        uint32_t columns[2];
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const int row = 8 * block + across, channel = k + along + w * 8;
          float x[2], decay[2];
          decays(before, row, channel, decay);
          pair(At::kK, row, channel, x);
          columns[w] = hopper::pack_pair<In>(x[0] * decay[0], x[1] * decay[1]);
        }
        hopper::mma_m16n8k16(qk[block], q, columns, In{});
        if constexpr (kDelta) hopper::mma_m16n8k16(kk[block], rows, columns, In{});
      }
    }
#pragma unroll
    for (int block = 0; block < kMaxBlocks; ++block) {
      if (8 * block >= first) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        put(first + across + i / 2 * 8, 8 * block + along + i % 2, qk[block][i], kk[block][i]);
    }
  }

  // By one warp: of 16 rows from `first` on the second 8, by the columns of the first 8.
  TILEWRIGHT_DEVICE void multiply_corner(int first) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, across = lane / 4, along = lane % 4 * 2, before = first + 7;
    float qk[4] = {}, kk[4] = {};
    for (int k = 0; k < kKeys; k += 16) {
      // The product's first 8 rows are not wanted.
      uint32_t q[4] = {}, rows[4] = {}, columns[2];
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const int row = first + 8 + across, column = first + across, channel = k + along + w * 8;
        float x[2], decay[2];
        decays(row, before, channel, decay);
        pair(At::kQ, row, channel, x);
        q[2 * w + 1] = hopper::pack_pair<In>(x[0] * decay[0], x[1] * decay[1]);
        pair(At::kK, row, channel, x);
        rows[2 * w + 1] = hopper::pack_pair<In>(x[0] * decay[0], x[1] * decay[1]);
        decays(before, column, channel, decay);
        pair(At::kK, column, channel, x);
        columns[w] = hopper::pack_pair<In>(x[0] * decay[0], x[1] * decay[1]);
      }
      hopper::mma_m16n8k16(qk, q, columns, In{});
      if constexpr (kDelta) hopper::mma_m16n8k16(kk, rows, columns, In{});
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) put(first + 8 + across, first + along + i, qk[2 + i], kk[2 + i]);
  }

  // By one warp: the two squares of 8 on the diagonal. A lane has one row and every second column.
  TILEWRIGHT_DEVICE void multiply_diagonal(int first) const {
    constexpr int kColumns = 4;
    const int lane = static_cast<int>(threadIdx.x) % 32, row = first + lane % kSquare;
    const int column = first + lane % kSquare / 8 * 8 + lane / kSquare;
    float qk[kColumns] = {}, kk[kColumns] = {};
#pragma unroll 2
    for (int channel = 0; channel < kKeys; channel += 2) {
      float q[2], k[2];
      pair(At::kQ, row, channel, q);
      pair(At::kK, row, channel, k);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float x[2], decay[2];
        pair(At::kK, column + 2 * c, channel, x);
        decays(row, column + 2 * c, channel, decay);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          qk[c] = fmaf(q[i], x[i] * decay[i], qk[c]);
          if constexpr (kDelta) kk[c] = fmaf(k[i], x[i] * decay[i], kk[c]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (column + 2 * c <= row) put(row, column + 2 * c, qk[c], kk[c]);
    }
  }

  // Keys and queries as the second kernel reads and writes the state with them.
  TILEWRIGHT_DEVICE void store_keys() const {
    constexpr int kPieces = kKeys / 8;
    const Prepared& to = params.to;
    for (int i = static_cast<int>(threadIdx.x); i < kChunk * kPieces; i += kPrepareThreads) {
      const int row = i / kPieces, channel = i % kPieces * 8;
      uint32_t reads[4], queries[4], writes[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float q[2], k[2], into[2], onto[2];
        pair(At::kQ, row, channel + 2 * w, q);
        pair(At::kK, row, channel + 2 * w, k);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float sum = sums(row)[channel + 2 * w + c];
          into[c] = exp2f(sum);
          onto[c] = exp2f(sums(kChunk - 1)[channel + 2 * w + c] - sum);
        }
        const float scale = params.problem.scale;
        reads[w] = hopper::pack_pair<In>(k[0] * into[0], k[1] * into[1]);
        queries[w] = hopper::pack_pair<In>(scale * q[0] * into[0], scale * q[1] * into[1]);
        writes[w] = hopper::pack_pair<In>(k[0] * onto[0], k[1] * onto[1]);
      }
      const uint32_t at = Tile::offset(row, channel);
      if constexpr (kDelta) {
        hopper::store_16(to.keys(to.reads, index) + at, hopper::U128{reads[0], reads[1], reads[2], reads[3]});
      }
      hopper::store_16(to.keys(to.queries, index) + at, hopper::U128{queries[0], queries[1], queries[2], queries[3]});
      hopper::store_16(to.keys(to.writes, index) + at, hopper::U128{writes[0], writes[1], writes[2], writes[3]});
    }
  }
};

}  // namespace prepare

template <class In, int kKeys, bool kDelta>
__global__ void __launch_bounds__(kPrepareThreads, 2)
    prepare_channel_kernel(const __grid_constant__ PrepareParams<In> params) {
  using namespace prepare;
  using At = ChannelLayout<In, kKeys>;
  const Problem<In, float>& p = params.problem;
  const Chunk chunk = chunk_at(p.sequences, blockIdx.x);
  if (chunk.rows == 0) return;
  const int64_t head = static_cast<int64_t>(blockIdx.y),
                index = static_cast<int64_t>(blockIdx.x) * p.value_heads + head;
  char* shared = hopper::shared_memory();
  const ChannelBlock<In, kKeys, kDelta> block{params, chunk, head, index, shared};
  load_rows<In, kKeys>(p.k, chunk, p.key_head(head), p.key_size, shared + At::kK);
  load_rows<In, kKeys>(p.q, chunk, p.key_head(head), p.key_size, shared + At::kQ);
  hopper::copy_async_commit();
  block.load_sums();
  block.clear_products();
  hopper::copy_async_wait<0>();
  __syncthreads();

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  block.multiply_left(warp * kSquare);
  block.multiply_corner(warp * kSquare);
  block.multiply_diagonal(warp * kSquare);
  hopper::fence_async_shared();
  __syncthreads();
  if (thread == 96) {
    hopper::store_bulk(params.to.square(params.to.scores, index), shared + At::kScores, kSquareBytes);
    hopper::store_commit();
  }
  if constexpr (kDelta) {
    const auto* matrix = reinterpret_cast<const float*>(shared + At::kMatrix);
    if (warp == 0) invert_columns<In, 0>(matrix, shared + At::kInverse);
    if (warp == 1) invert_columns<In, 32>(matrix, shared + At::kInverse);
    hopper::fence_async_shared();
  }
  block.store_keys();
  if constexpr (kDelta) {
    __syncthreads();
    if (thread == 0) {
      hopper::store_bulk(params.to.square(params.to.inverse, index), shared + At::kInverse, kSquareBytes);
      hopper::store_commit();
    }
  }
  if (thread == 0 || thread == 96) hopper::store_wait<0>();
}

}  // namespace tilewright::linear_attention::cuda
