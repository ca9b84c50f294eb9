// SPDX-License-Identifier: Apache-2.0
// A warp that copies tiles into a ring of stages and a warpgroup that adds them up; and cp.async.
#include "cases.h"

namespace tilewright::emulator_tests {
namespace {

enum class Ring {
  kRight,
  kPolling,
  kNoInit,
  kNoSyncAfterInit,
  kNoInitFence,
  kNeverArmed,
  kTooFewBytes,
  kTooManyBytes,
  kArriveWithoutBytes,
  kWrongPhase,
  kNoWait,
  kNoWaitForEmpty,
  kOverlap,
  kEarlyRelease,
  kReleaseByOneOfTheWarp,
  kDoubleRelease,
  kNoLastWait,
  kPastEnd,
  kMisalignedCopy,
  kBarrierOverwritten,
  kRewritten,
  kRewrittenFenced,
};

struct RingParams {
  const float* in;  // [tiles][256]
  float* out;       // [256]
  int tiles;
};

constexpr int kStages = 2, kTileFloats = 256, kTileBytes = 1024;

// Consumers: 4 warps, which release a stage with one arrival each.
template <Ring F>
__global__ void __launch_bounds__(160, 1) ring(const __grid_constant__ RingParams p) {
  constexpr int kStep = F == Ring::kOverlap ? kTileBytes - 128 : kTileBytes;
  char* const stages = shared_memory();
  auto* const full = reinterpret_cast<Barrier*>(shared_memory() + kStages * kTileBytes);
  auto* const empty = full + kStages;
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0 && F != Ring::kNoInit) {
    for (int s = 0; s < kStages; ++s) {
      init(full[s], 1);
      init(empty[s], 4);
    }
    if (F != Ring::kNoInitFence) fence_barrier_init();
  }
  if (F != Ring::kNoSyncAfterInit) __syncthreads();
  PipelineState<kStages> state;
  if (t >= 128) {
    if (t != 128) return;
    for (int i = 0; i < p.tiles; ++i) {
      Barrier& to = full[state.stage];
      if (F != Ring::kNoWaitForEmpty) wait(empty[state.stage], state.phase ^ 1);
      if (F == Ring::kBarrierOverwritten) *reinterpret_cast<uint64_t*>(&to) = 0;
      const uint32_t announced = F == Ring::kTooFewBytes    ? kTileBytes - 16
                                 : F == Ring::kTooManyBytes ? kTileBytes + 16
                                                            : kTileBytes;
      if (F == Ring::kArriveWithoutBytes) {
        arrive(to);
      } else if (F != Ring::kNeverArmed || i != 1) {
        arrive_expect(to, announced);
      }
      const float* from = p.in + (F == Ring::kPastEnd ? i + 1 : i) * kTileFloats + (F == Ring::kMisalignedCopy ? 1 : 0);
      load_bulk(stages + state.stage * kStep, from, kTileBytes, to);
      state.advance();
    }
    return;
  }
  float sum[2] = {0.0f, 0.0f};
  for (int i = 0; i < p.tiles; ++i) {
    if (F == Ring::kPolling) {
      while (!try_wait(full[state.stage], state.phase)) {
      }
    } else if ((F != Ring::kNoWait || i != 2) && (F != Ring::kNoLastWait || i + 1 < p.tiles)) {
      wait(full[state.stage], F == Ring::kWrongPhase ? state.phase ^ 1 : state.phase);
    }
    const auto* tile = reinterpret_cast<const float*>(stages + state.stage * kStep);
    if (F == Ring::kEarlyRelease) {
      __syncwarp();
      if (t % 32 == 0) arrive(empty[state.stage]);
    }
    sum[0] += tile[t];
    sum[1] += tile[t + 128];
    if (F == Ring::kRewritten || F == Ring::kRewrittenFenced) const_cast<float*>(tile)[t] = sum[0];
    if (F == Ring::kRewrittenFenced) fence_async_shared();
    if (F != Ring::kReleaseByOneOfTheWarp) __syncwarp();
    if (F != Ring::kEarlyRelease && t % 32 == 0) arrive(empty[state.stage]);
    if (F == Ring::kDoubleRelease && t == 0) arrive(empty[state.stage]);
    state.advance();
  }
  p.out[t] = sum[0];
  p.out[t + 128] = sum[1];
}

template <Ring F>
bool run_ring() {
  constexpr int kTiles = 7;
  Global<float> in(kTiles * kTileFloats), out(kTileFloats);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  launch(ring<F>, Grid{.threads = 160, .shared_bytes = kStages * kTileBytes + 64},
         RingParams{in.data(), out.data(), kTiles});
  for (size_t i = 0; i < kTileFloats; ++i) {
    if (out[i] != static_cast<float>(kTiles * i + kTileFloats * kTiles * (kTiles - 1) / 2)) return false;
  }
  return true;
}

enum class Many { kRight, kTwice, kTooMany };

// Everybody arrives at a barrier for the whole block.
template <Many F>
__global__ void __launch_bounds__(64, 1) everybody(const __grid_constant__ RingParams p) {
  auto& barrier = *reinterpret_cast<Barrier*>(shared_memory());
  auto* const tile = reinterpret_cast<float*>(shared_memory() + 64);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) init(barrier, F == Many::kTooMany ? 63 : 64);
  __syncthreads();
  tile[t] = p.in[t];
  arrive(barrier);
  if (F == Many::kTwice && t % 32 == 7) arrive(barrier);
  wait(barrier, 0);
  p.out[t] = tile[63 - t];
}

template <Many F>
bool run_everybody() {
  Global<float> in(64), out(64);
  for (size_t i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  launch(everybody<F>, Grid{.threads = 64, .shared_bytes = 64 + 256}, RingParams{in.data(), out.data(), 0});
  for (size_t i = 0; i < 64; ++i) {
    if (out[i] != static_cast<float>(63 - i)) return false;
  }
  return true;
}

enum class Async { kRight, kNoWait, kWaitTooShort, kNoSync, kNoCommit, kReturns, kTooManyValid };

template <Async F>
__global__ void __launch_bounds__(64, 1) async(const __grid_constant__ RingParams p) {
  const int t = static_cast<int>(threadIdx.x);
  char* const tile = shared_memory();
  for (int i = 0; i < 2; ++i) {
    const int valid = i == 1 && t >= 60 ? (F == Async::kTooManyValid ? 16 : 8 * (t == 60)) : 16;
    copy_async_16(tile + (i * 64 + t) * 16, p.in + (i * 64 + t) * 4, valid);
    if (F != Async::kNoCommit) copy_async_commit();
  }
  if (F == Async::kReturns && t == 63) return;
  if (F == Async::kWaitTooShort) {
    copy_async_wait<1>();
  } else if (F != Async::kNoWait) {
    copy_async_wait<0>();
  }
  if (F != Async::kNoSync) __syncthreads();
  const auto* floats = reinterpret_cast<const float*>(tile);
  for (int i = t; i < 512; i += 64) p.out[i] = floats[511 - i];
}

template <Async F>
bool run_async() {
  Global<float> in(64 * 4 + 60 * 4 + 2), out(512);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i + 1);
  launch(async<F>, Grid{.threads = 64, .shared_bytes = 2048}, RingParams{in.data(), out.data(), 0});
  for (size_t i = 0; i < 512; ++i) {
    if (out[i] != (511 - i < in.size() ? static_cast<float>(512 - i) : 0.0f)) return false;
  }
  return true;
}

}  // namespace

std::vector<Case> pipeline_cases() {
  return {
      {"ring", "", run_ring<Ring::kRight>},
      {"ring, polled", "", run_ring<Ring::kPolling>},
      {"ring without init", "there is no barrier at shared byte", run_ring<Ring::kNoInit>},
      {"ring without __syncthreads after init", "init()", run_ring<Ring::kNoSyncAfterInit>},
      {"ring without fence_barrier_init", "not followed by fence_barrier_init()", run_ring<Ring::kNoInitFence>},
      {"ring, a barrier never armed", "never armed in this phase", run_ring<Ring::kNeverArmed>},
      {"ring, too few bytes announced", "16 more bytes came to the barrier", run_ring<Ring::kTooFewBytes>},
      {"ring, too many bytes announced", "16 announced bytes never came", run_ring<Ring::kTooManyBytes>},
      {"ring, arrival that announces nothing", "reads shared byte", run_ring<Ring::kArriveWithoutBytes>},
      {"ring, wrong phase", "reads shared byte", run_ring<Ring::kWrongPhase>},
      {"ring, a wait left out", "reads shared byte|before thread 128 has seen the end of the phase",
       run_ring<Ring::kNoWait>},
      {"ring, the last wait left out", "shared byte", run_ring<Ring::kNoLastWait>},
      {"ring, no wait for an empty stage", "load_bulk writes shared byte|has all its 1 arrivals already",
       run_ring<Ring::kNoWaitForEmpty>},
      {"ring, stages overlap", "load_bulk", run_ring<Ring::kOverlap>},
      {"ring, stage released before it is read", "shared byte", run_ring<Ring::kEarlyRelease>},
      {"ring, stage released without __syncwarp", "race: load_bulk writes shared byte",
       run_ring<Ring::kReleaseByOneOfTheWarp>},
      {"ring, stage released twice", "shared byte", run_ring<Ring::kDoubleRelease>},
      {"ring, a tile past the end", "load_bulk reads global memory out of bounds", run_ring<Ring::kPastEnd>},
      {"ring, misaligned copy", "load_bulk from the misaligned address", run_ring<Ring::kMisalignedCopy>},
      {"ring, a barrier overwritten", "writes the barrier at shared byte", run_ring<Ring::kBarrierOverwritten>},
      {"ring, a stage written by hand and filled again", "overwrites shared byte", run_ring<Ring::kRewritten>},
      {"ring, a stage written by hand, fenced, filled again", "", run_ring<Ring::kRewrittenFenced>},
      {"barrier for everybody", "", run_everybody<Many::kRight>},
      {"barrier for everybody, one arrives twice", "arrives twice in phase 0", run_everybody<Many::kTwice>},
      {"barrier for fewer than arrive", "shared byte", run_everybody<Many::kTooMany>},
      {"cp.async", "", run_async<Async::kRight>},
      {"cp.async without wait", "shared byte", run_async<Async::kNoWait>},
      {"cp.async, wait for all but one", "while an asynchronous copy into it is on its way",
       run_async<Async::kWaitTooShort>},
      {"cp.async without __syncthreads", "reads shared byte", run_async<Async::kNoSync>},
      {"cp.async without commit", "while an asynchronous copy into it is on its way", run_async<Async::kNoCommit>},
      {"cp.async, a thread returns before it ends", "returns while a copy_async", run_async<Async::kReturns>},
      {"cp.async past the end", "copy_async reads global memory out of bounds", run_async<Async::kTooManyValid>},
  };
}

}  // namespace tilewright::emulator_tests
