// SPDX-License-Identifier: Apache-2.0
// Boxes and runs of bytes through the copy engine, in both directions.
#include "cases.h"

namespace tilewright::emulator_tests {
namespace {

enum class Store {
  kRight,
  kEarlyOverwrite,
  kNoProxyFence,
  kNoSync,
  kNoCommit,
  kReturns,
  kWaitTooShort,
  kPastEnd,
  kMisplaced,
};

struct StoreParams {
  TensorMap to;  // [rows][64] of bf16
  bf16* run;     // [rounds][16][64]
};

using StoreTile = Tile<bf16, 16, 64, Swizzle::k128>;
constexpr int kRounds = 3;

// Each round fills the tile and stores it as a box; the unswizzled copy behind it goes out as a run of bytes.
template <Store F>
__global__ void __launch_bounds__(64, 1) store(const __grid_constant__ StoreParams p) {
  char* const tile = shared_memory() + (F == Store::kMisplaced ? 64 : 0);
  char* const plain = shared_memory() + StoreTile::kBytes + 1024;
  const int t = static_cast<int>(threadIdx.x);
  for (int round = 0; round < kRounds; ++round) {
    for (int i = t; i < 16 * 64; i += 64) {
      const bf16 value = from_float<bf16>(static_cast<float>(round * 50 + i % 64));
      *StoreTile::at(tile, i / 64, i % 64) = value;
      reinterpret_cast<bf16*>(plain)[i] = value;
    }
    if (F != Store::kNoProxyFence) fence_async_shared();
    if (F != Store::kNoSync) __syncthreads();
    if (t == 0) {
      store_tile(p.to, tile, 0, round * 16);
      if (F == Store::kWaitTooShort) store_commit();
      store_bulk(p.run + (F == Store::kPastEnd ? round + 1 : round) * 1024, plain, 2048);
      if (F != Store::kNoCommit) store_commit();
      if (F == Store::kReturns && round == kRounds - 1) return;
      if (F == Store::kWaitTooShort) {
        store_wait<1>();
      } else if (F != Store::kEarlyOverwrite) {
        store_wait<0>();
      }
    }
    if (round + 1 < kRounds) __syncthreads();
  }
  if (t == 0) store_wait_all();
}

template <Store F>
bool run_store() {
  constexpr int kRows = 43;  // the last box hangs over
  Global<bf16> to(kRows * 64), run(kRounds * 1024);
  const uint64_t sizes[2] = {64, kRows}, strides[1] = {128};
  const uint32_t box[2] = {64, 16};
  launch(store<F>, Grid{.threads = 64, .shared_bytes = 2 * StoreTile::kBytes + 1024},
         StoreParams{make_tensor_map<bf16>(to.data(), 2, sizes, strides, box, Swizzle::k128), run.data()});
  for (size_t i = 0; i < run.size(); ++i) {
    const auto want = static_cast<float>(i / 1024 * 50 + i % 64);
    if (to_float(run[i]) != want || (i < to.size() && to_float(to[i]) != want)) return false;
  }
  return true;
}

template <int kRank>
struct BoxParams {
  TensorMap from;
  uint32_t* to;
  int corner[5];
};

// A box of any rank, as it lies without swizzle.
template <int kRank>
__global__ void __launch_bounds__(32, 1) box_of_rank(const __grid_constant__ BoxParams<kRank> p) {
  auto& full = *reinterpret_cast<Barrier*>(shared_memory());
  char* const tile = shared_memory() + 1024;
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    init(full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  constexpr int kElements = 4 << (kRank - 1);
  if (t == 0) {
    arrive_expect(full, kElements * 4);
    const int* c = p.corner;
    if constexpr (kRank == 2) load_tile(tile, p.from, full, c[0], c[1]);
    if constexpr (kRank == 3) load_tile(tile, p.from, full, c[0], c[1], c[2]);
    if constexpr (kRank == 4) load_tile(tile, p.from, full, c[0], c[1], c[2], c[3]);
    if constexpr (kRank == 5) load_tile(tile, p.from, full, c[0], c[1], c[2], c[3], c[4]);
  }
  wait(full, 0);
  for (int i = t; i < kElements; i += 32) p.to[i] = reinterpret_cast<const uint32_t*>(tile)[i];
}

// A tensor of 3 x 3 x ... x 5 elements and boxes of 2 x 2 x ... x 4 from every corner that touches it.
template <int kRank>
bool run_box() {
  uint64_t sizes[5] = {5, 3, 3, 3, 3}, strides[4];
  uint32_t box[5] = {4, 2, 2, 2, 2};
  size_t count = 8;  // rows of 32 bytes, the last 12 of them not part of the tensor
  for (int d = 1; d < kRank; ++d) {
    strides[d - 1] = count * 4;
    count *= 3;
  }
  Global<uint32_t> from(count), to(static_cast<size_t>(4) << (kRank - 1));
  for (size_t i = 0; i < count; ++i) from[i] = static_cast<uint32_t>(i + 1);
  const TensorMap map = make_tensor_map<uint32_t>(from.data(), kRank, sizes, strides, box, Swizzle::kNone);
  for (int corner = -1; corner < 3; ++corner) {
    BoxParams<kRank> p{map, to.data(), {}};
    for (int d = 0; d < kRank; ++d) p.corner[d] = d % 2 == 0 ? corner : 1 - corner;
    launch(box_of_rank<kRank>, Grid{.threads = 32, .shared_bytes = 1024 + (16 << (kRank - 1))}, p);
    for (size_t i = 0; i < to.size(); ++i) {
      size_t left = i, at = 0;
      bool inside = true;
      for (int d = 0; d < kRank; ++d) {
        const int64_t c = p.corner[d] + static_cast<int64_t>(left % box[d]);
        left /= box[d];
        inside = inside && c >= 0 && c < static_cast<int64_t>(sizes[d]);
        at += static_cast<size_t>(c) * (d == 0 ? 1 : strides[d - 1] / 4);
      }
      if (to[i] != (inside ? from[at] : 0u)) return false;
    }
  }
  return true;
}

template <bool kStride>
bool run_refused_map() {
  Global<bf16> from(64 * 64);
  const uint64_t sizes[2] = {60, 64}, strides[1] = {kStride ? 120u : 128u};
  const uint32_t box[2] = {32, 8};
  make_tensor_map<bf16>(from.data(), 2, sizes, strides, box, Swizzle::k128);
  return true;
}

}  // namespace

std::vector<Case> store_cases() {
  return {
      {"stores", "", run_store<Store::kRight>},
      {"store, source overwritten early", "still reads it", run_store<Store::kEarlyOverwrite>},
      {"store without fence_async_shared", "without a fence_async_shared() since", run_store<Store::kNoProxyFence>},
      {"store without __syncthreads", "store_", run_store<Store::kNoSync>},
      {"store without commit", "still reads it|bulk store", run_store<Store::kNoCommit>},
      {"store, the thread returns", "returns while a bulk store still reads", run_store<Store::kReturns>},
      {"store, wait for all but one", "still reads it", run_store<Store::kWaitTooShort>},
      {"store past the end", "store_bulk writes global memory out of bounds", run_store<Store::kPastEnd>},
      {"store from a misplaced tile", "is no multiple of 128", run_store<Store::kMisplaced>},
      {"boxes of rank 2", "", run_box<2>},
      {"boxes of rank 3", "", run_box<3>},
      {"boxes of rank 4", "", run_box<4>},
      {"boxes of rank 5", "", run_box<5>},
      {"tensor map with a stride of 120 bytes", "a multiple of 16 bytes below 2^40 is needed", run_refused_map<true>},
      {"tensor map narrower than its swizzle", "the swizzle's 128 are needed", run_refused_map<false>},
  };
}

}  // namespace tilewright::emulator_tests
