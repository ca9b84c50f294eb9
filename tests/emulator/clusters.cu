// SPDX-License-Identifier: Apache-2.0
// Blocks of a cluster: multicast copies, barriers and shared memory of other blocks.
#include "cases.h"

namespace tilewright::emulator_tests {
namespace {

enum class Cast { kRight, kNoClusterSync, kNoPeerArrival, kOnlyOwnBytes, kLeavesEarly, kWrongRank };

struct CastParams {
  TensorMap from;  // [2 * rounds * 8][64] of bf16
  bf16* to;        // [blocks][rounds][16][64]
};

using CastTile = Tile<bf16, 8, 64, Swizzle::k128>;
constexpr int kCastRounds = 3;

// Each block of the pair brings half of a tile to both; a stage is free once the threads of both blocks have said so.
template <Cast F>
__global__ void __launch_bounds__(64, 1) cast(const __grid_constant__ CastParams p) {
  char* const tile = shared_memory();
  auto& full = *reinterpret_cast<Barrier*>(shared_memory() + 2 * CastTile::kBytes);
  auto& empty = *(&full + 1);
  const int t = static_cast<int>(threadIdx.x), rank = cluster_rank(), other = 1 - rank;
  if (t == 0) {
    init(full, 1);
    init(empty, 2);
    fence_barrier_init();
  }
  if (F == Cast::kNoClusterSync) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  for (int round = 0; round < kCastRounds; ++round) {
    const auto phase = static_cast<uint32_t>(round & 1);
    if (t == 0) {
      wait(empty, phase ^ 1);
      arrive_expect(full, F == Cast::kOnlyOwnBytes ? CastTile::kBytes : 2 * CastTile::kBytes);
      load_tile_multicast(tile + rank * CastTile::kBytes, p.from, full, F == Cast::kWrongRank ? 4 : 3, 0,
                          (2 * round + rank) * 8);
    }
    wait(full, phase);
    for (int i = t; i < 16 * 64; i += 64) {
      p.to[(static_cast<int>(blockIdx.x) * kCastRounds + round) * 1024 + i] =
          *CastTile::at(tile + i / 512 * CastTile::kBytes, i / 64 % 8, i % 64);
    }
    __syncthreads();
    if (t == 0) {
      arrive(empty);
      if (F == Cast::kNoPeerArrival) {
        arrive(empty);
      } else {
        arrive_cluster(empty, other);
      }
    }
  }
  if (F != Cast::kLeavesEarly) cluster_sync();
}

template <Cast F>
bool run_cast() {
  Global<bf16> from(kCastRounds * 1024), to(4 * kCastRounds * 1024);
  for (size_t i = 0; i < from.size(); ++i) from[i] = {static_cast<uint16_t>(i + 1)};
  const uint64_t sizes[2] = {64, kCastRounds * 16}, strides[1] = {128};
  const uint32_t box[2] = {64, 8};
  launch(cast<F>, Grid{.blocks = {4}, .threads = 64, .cluster = 2, .shared_bytes = 2 * CastTile::kBytes + 64},
         CastParams{make_tensor_map<bf16>(from.data(), 2, sizes, strides, box, Swizzle::k128), to.data()});
  for (size_t i = 0; i < to.size(); ++i) {
    if (to[i].bits != from[i % from.size()].bits) return false;
  }
  return true;
}

bool run_odd_cluster() {
  launch(cast<Cast::kRight>, Grid{.blocks = {3}, .threads = 64, .cluster = 2, .shared_bytes = 4096}, CastParams{});
  return true;
}

enum class Peek { kRight, kNoClusterSync, kWrongRank, kUnwritten };

struct PeekParams {
  float* to;  // [blocks][threads]
};

// Each block reads what the next one of its cluster of four wrote.
template <Peek F>
__global__ void __launch_bounds__(64, 1) peek(const __grid_constant__ PeekParams p) {
  auto* const values = reinterpret_cast<float*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x), rank = cluster_rank();
  if (F != Peek::kUnwritten || rank != 2) values[t] = static_cast<float>(block * 64 + t);
  if (F == Peek::kNoClusterSync) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  p.to[block * 64 + t] = load_cluster(values + t, F == Peek::kWrongRank ? 4 : (rank + 1) % 4);
  cluster_sync();
}

template <Peek F>
bool run_peek() {
  Global<float> to(8 * 64);
  launch(peek<F>, Grid{.blocks = {8}, .threads = 64, .cluster = 4, .shared_bytes = 256}, PeekParams{to.data()});
  for (int i = 0; i < 8 * 64; ++i) {
    const int block = i / 64, next = block / 4 * 4 + (block + 1) % 4;
    if (to[i] != static_cast<float>(next * 64 + i % 64)) return false;
  }
  return true;
}

}  // namespace

std::vector<Case> cluster_cases() {
  return {
      {"cluster", "", run_cast<Cast::kRight>},
      {"cluster without cluster_sync", "init()|has no barrier at shared byte", run_cast<Cast::kNoClusterSync>},
      {"cluster, nobody asks the other block", "load_tile", run_cast<Cast::kNoPeerArrival>},
      {"cluster, only half of the bytes announced", "more bytes came to the barrier|while an asynchronous copy into it",
       run_cast<Cast::kOnlyOwnBytes>},
      {"cluster, multicast to a block that is not there", "of a cluster of 2", run_cast<Cast::kWrongRank>},
      {"cluster, another block's shared memory", "", run_peek<Peek::kRight>},
      {"the same without cluster_sync", "which nothing has written|no barrier between", run_peek<Peek::kNoClusterSync>},
      {"the same of a block that is not there", "of a cluster of 4", run_peek<Peek::kWrongRank>},
      {"the same where nothing was written", "which nothing has written", run_peek<Peek::kUnwritten>},
      {"three blocks in clusters of two", "no whole number of clusters", run_odd_cluster},
  };
}

}  // namespace tilewright::emulator_tests
