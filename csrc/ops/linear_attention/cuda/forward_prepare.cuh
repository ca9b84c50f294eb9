// SPDX-License-Identifier: Apache-2.0
// The delta rule's first kernel: one block for each chunk and key head, all in parallel. Keys are loaded once for the
// value heads of the group, or some of them where that leaves the device idle; gates are a mask on K K^T.
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
  int members;  // value heads of a block; not read with a decay a channel
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
  static constexpr int kInverse = kK + Keys<In, kKeys>::kBytes;
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

// Running sums and betas of one head's chunk, by one warp.
template <class In>
TILEWRIGHT_DEVICE void load_gates(const Problem<In, float>& p, const Chunk& chunk, int64_t head, ChunkGates& gates) {
  const TokenGates own = fetch_gates<true>(p, chunk.batch, chunk.first, chunk.rows, head);
  float sums[2];
  sum_gates(own, sums);
  const int token = 2 * (static_cast<int>(threadIdx.x) % 32);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    gates.sum[token + i] = sums[i];
    gates.beta[token + i] = own.beta[i];
  }
}

// K K^T, masked by one value head's gates: the columns of A diag(beta) to be solved with.
template <class In, int kKeys>
TILEWRIGHT_DEVICE void multiply_keys(const void* keys, const ChunkGates& gates, float* matrix) {
  using Tile = Keys<In, kKeys>;
  using Product = hopper::Wgmma<In, In, kChunk>;
  float kk[32];
  hopper::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kKeys; k += Product::kDepth) {
    Product::run(kk, Tile::k_major(keys, 0, k), Tile::k_major(keys, 0, k), k > 0);
  }
  hopper::wgmma_commit();
  hopper::wgmma_wait<0>();
  hopper::keep(kk);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int row = hopper::accumulator_row(thread, i), column = hopper::accumulator_col(thread, i);
    const bool below = row > column;
    // Above the diagonal the exponent would be positive.
    const float decay = exp2f(below ? gates.sum[row] - gates.sum[column] : 0.0f) * gates.beta[column];
    matrix[column * kMatrixStride + row] = below ? kk[i] * decay : 0.0f;
  }
}

}  // namespace prepare

template <class In, int kKeys>
__global__ void __launch_bounds__(kPrepareThreads, kKeys == 128 ? 4 : 3)
    prepare_kernel(const __grid_constant__ PrepareParams<In> params) {
  using namespace prepare;
  using At = Layout<In, kKeys>;
  const Problem<In, float>& p = params.problem;
  const Chunk chunk = chunk_at(p.sequences, blockIdx.x);
  if (chunk.rows == 0) return;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int group = static_cast<int>(p.value_heads / p.heads), parts = (group + params.members - 1) / params.members;
  const int key_head = static_cast<int>(blockIdx.y) / parts;
  const int first = static_cast<int>(blockIdx.y) % parts * params.members, count = min(group - first, params.members);
  char* shared = hopper::shared_memory();
  auto* gates = reinterpret_cast<ChunkGates*>(shared + At::kGates);
  auto* matrix = reinterpret_cast<float*>(shared + At::kMatrix);

  load_rows<In, kKeys>(p.k, chunk, key_head, p.key_size, shared + At::kK);
  hopper::copy_async_commit();
  for (int member = 0; member < count; ++member) {
    const int64_t head = static_cast<int64_t>(key_head) * group + first + member;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * p.value_heads + head;
    // Gates of the next heads, one a warp; at first while rows come.
    if (member % kPrepareWarps == 0 && member + warp < count) load_gates(p, chunk, head + warp, gates[warp]);
    if (member == 0) {
      hopper::copy_async_wait<0>();
      hopper::fence_async_shared();
    }
    __syncthreads();
    // The product anew for every head of the group: it costs less than the registers that would keep it.
    multiply_keys<In, kKeys>(shared + At::kK, gates[member % kPrepareWarps], matrix);
    // The inverse of the head before is on its way out; who sent it waits until it is read.
    if (thread % 32 == 0) hopper::store_wait<0>();
    __syncthreads();
    // The two warps that solve change from head to head and block to block: warps of one number share a scheduler.
    const int solver = (static_cast<int>(blockIdx.x) + member) % 4;
    if (warp == solver) invert_columns<In, 0>(matrix, shared + At::kInverse);
    if (warp == (solver + 2) % 4) invert_columns<In, 32>(matrix, shared + At::kInverse);
    hopper::fence_async_shared();
    __syncthreads();
    if (warp == solver && thread % 32 == 0) {
      hopper::store_bulk(params.to.square(params.to.inverse, index), shared + At::kInverse, kSquareBytes);
      hopper::store_commit();
    }
  }
  if (thread % 32 == 0) hopper::store_wait<0>();
}

}  // namespace tilewright::linear_attention::cuda
