// SPDX-License-Identifier: Apache-2.0
// The chunk form's first kernel: one block for each chunk and key head, all in parallel. The rows of Q and K are loaded
// once for every value head of the group; gates are a mask on their products.
#pragma once

#include "hopper/hopper.h"
#include "ops/linear_attention/cuda/gates.cuh"
#include "ops/linear_attention/cuda/prepared.h"
#include "ops/linear_attention/cuda/unit_lower.cuh"

namespace tilewright::linear_attention::cuda {

inline constexpr int kPrepareThreads = 128;
inline constexpr int kPrepareWarps = kPrepareThreads / 32;

template <class In>
struct PrepareParams {
  Problem<In, float> problem;
  Prepared to;
};

namespace prepare {

using hopper::Swizzle;

template <class In>
using Square = hopper::Tile<In, kChunk, kChunk, Swizzle::k128>;
template <class In, int kKeys>
using Keys = hopper::Tile<In, kChunk, kKeys, Swizzle::k128>;

// Of a block's shared memory, in bytes.
template <class In, int kKeys>
struct Layout {
  static constexpr int kK = 0;
  static constexpr int kQ = kK + Keys<In, kKeys>::kBytes;
  static constexpr int kScores = kQ + Keys<In, kKeys>::kBytes;
  static constexpr int kInverse = kScores + kSquareBytes;
  static constexpr int kMatrix = kInverse + kSquareBytes;
  static constexpr int kGates = kMatrix + kMatrixFloats * 4;
  static constexpr int kBytes = kGates + kPrepareWarps * static_cast<int>(sizeof(ChunkGates));
};

// Rows of one head into a tile, zero behind the chunk's end and behind K.
template <class In, int kKeys>
TILEWRIGHT_DEVICE void load_rows(const Rows<const In>& rows, const Chunk& chunk, int64_t head, int64_t key_size,
                                 void* tile) {
  constexpr int kPieces = kKeys / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kChunk * kPieces; i += kPrepareThreads) {
    const int row = i / kPieces, column = i % kPieces * 8;
    const bool inside = row < chunk.rows && column < key_size;
    const In* from = rows.row(chunk.batch, chunk.first + (inside ? row : 0), head) + (inside ? column : 0);
    hopper::copy_async_16(Keys<In, kKeys>::at(tile, row, column), from, inside ? 16 : 0);
  }
}

// a [C, K] times b [C, K]^T.
template <class In, int kKeys>
TILEWRIGHT_DEVICE void multiply_rows(float (&product)[32], const void* a, const void* b) {
  using Tile = Keys<In, kKeys>;
  using Product = hopper::Wgmma<In, In, kChunk>;
#pragma unroll
  for (int k = 0; k < kKeys; k += Product::kDepth) {
    Product::run(product, Tile::k_major(a, 0, k), Tile::k_major(b, 0, k), k > 0);
  }
}

// Masks the products of one value head: scores for the second kernel, and the columns of A diag(beta) to be solved with.
template <class In, bool kDelta>
TILEWRIGHT_DEVICE void mask_products(const float (&qk)[32], const float (&kk)[32], const ChunkGates& gates, float scale,
                                     void* scores, float* matrix) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    const int row = hopper::accumulator_row(thread, i), column = hopper::accumulator_col(thread, i);
    float score[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const bool below = row > column + c, seen = row >= column + c;
      // Above the diagonal the exponent would be positive.
      const float decay = exp2f(seen ? gates.sum[row] - gates.sum[column + c] : 0.0f) * gates.beta[column + c];
      score[c] = seen ? scale * qk[i + c] * decay : 0.0f;
      if constexpr (kDelta) matrix[(column + c) * kMatrixStride + row] = below ? kk[i + c] * decay : 0.0f;
    }
    *reinterpret_cast<uint32_t*>(Square<In>::at(scores, row, column)) = hopper::pack_pair<In>(score[0], score[1]);
  }
}

// The products anew for every head of the group: they cost less than the registers that would keep them.
template <class In, int kKeys, bool kDelta>
TILEWRIGHT_DEVICE void multiply_and_mask(char* shared, const ChunkGates& gates, float scale) {
  using At = Layout<In, kKeys>;
  float kk[32], qk[32];
  hopper::wgmma_fence();
  if constexpr (kDelta) multiply_rows<In, kKeys>(kk, shared + At::kK, shared + At::kK);
  multiply_rows<In, kKeys>(qk, shared + At::kQ, shared + At::kK);
  hopper::wgmma_commit();
  hopper::wgmma_wait<0>();
  if constexpr (kDelta) hopper::keep(kk);
  hopper::keep(qk);
  mask_products<In, kDelta>(qk, kk, gates, scale, shared + At::kScores, reinterpret_cast<float*>(shared + At::kMatrix));
}

}  // namespace prepare

template <class In, int kKeys, bool kDelta>
__global__ void __launch_bounds__(kPrepareThreads, 3) prepare_kernel(const __grid_constant__ PrepareParams<In> params) {
  using namespace prepare;
  using At = Layout<In, kKeys>;
  const Problem<In, float>& p = params.problem;
  const Chunk chunk = chunk_at(p.sequences, blockIdx.x);
  if (chunk.rows == 0) return;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, key_head = static_cast<int>(blockIdx.y);
  char* shared = hopper::shared_memory();
  auto* gates = reinterpret_cast<ChunkGates*>(shared + At::kGates);
  auto* matrix = reinterpret_cast<float*>(shared + At::kMatrix);

  load_rows<In, kKeys>(p.k, chunk, key_head, p.key_size, shared + At::kK);
  load_rows<In, kKeys>(p.q, chunk, key_head, p.key_size, shared + At::kQ);
  hopper::copy_async_commit();
  const int group = static_cast<int>(p.value_heads / p.heads);
  for (int member = 0; member < group; ++member) {
    const int64_t head = static_cast<int64_t>(key_head) * group + member;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * p.value_heads + head;
    // The two warps that solve change from head to head and block to block: warps of one number share a scheduler.
    const int solver = (static_cast<int>(blockIdx.x) + member) % 4;
    const int part = warp == solver ? 0 : warp == (solver + 2) % 4 ? 1 : 2;
    // Gates of the next heads, one a warp, while the one before is solved for; at first while rows come.
    if (member % kPrepareWarps == 0 && member + warp < group) {
      load_gates<kDelta>(p, chunk, head + warp, gates[warp], params.to.row(index + warp));
    }
    if (member == 0) {
      hopper::copy_async_wait<0>();
      hopper::fence_async_shared();
    }
    // The tiles of the head before are on their way out; whoever sent them waits until they are read.
    if (thread % 32 == 0) hopper::store_wait<0>();
    __syncthreads();
    multiply_and_mask<In, kKeys, kDelta>(shared, gates[member % kPrepareWarps], p.scale);
    hopper::fence_async_shared();
    __syncthreads();
    if (part == 2 && warp == (solver + 1) % 4 && thread % 32 == 0) {
      hopper::store_bulk(params.to.square(params.to.scores, index), shared + At::kScores, kSquareBytes);
      hopper::store_commit();
    }
    if constexpr (kDelta) {
      if (part == 0) invert_columns<In, 0>(matrix, shared + At::kInverse);
      if (part == 1) invert_columns<In, 32>(matrix, shared + At::kInverse);
      hopper::fence_async_shared();
      __syncthreads();
      if (part == 0 && thread % 32 == 0) {
        hopper::store_bulk(params.to.square(params.to.inverse, index), shared + At::kInverse, kSquareBytes);
        hopper::store_commit();
      }
    }
  }
  if (thread % 32 == 0) hopper::store_wait<0>();
}

}  // namespace tilewright::linear_attention::cuda
