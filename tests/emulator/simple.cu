// SPDX-License-Identifier: Apache-2.0
// Threads, shared memory, warps, named barriers, global memory.
#include "cases.h"

namespace tilewright::emulator_tests {
namespace {

enum class Simple {
  kRight,
  kNoSyncthreads,
  kNoSyncBeforeReuse,
  kSharedOutOfBounds,
  kUnwritten,
  kGlobalPastEnd,
  kGlobalBeforeStart,
  kReadOnly,
  kMisaligned,
};

struct SimpleParams {
  const float* in;  // [128]
  float* out;       // [128]: reversed, plus the neighbour's, in two rounds
};

template <Simple F>
__global__ void __launch_bounds__(128, 1) reverse(const __grid_constant__ SimpleParams p) {
  auto* const tile = reinterpret_cast<float*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x);
  const int from = F == Simple::kGlobalPastEnd ? t + 1 : F == Simple::kGlobalBeforeStart ? t - 1 : t;
  if (F != Simple::kUnwritten || t != 5) tile[F == Simple::kSharedOutOfBounds ? t + 1 : t] = p.in[from];
  if (F != Simple::kNoSyncthreads) __syncthreads();
  float sum = tile[127 - t];
  if (F != Simple::kNoSyncBeforeReuse) __syncthreads();
  tile[t] = sum;
  __syncthreads();
  if (F == Simple::kMisaligned) {
    const float2 pair = *reinterpret_cast<const float2*>(tile + (t < 126 ? t : 0));
    sum += pair.x + pair.y;
  } else {
    sum += tile[(t + 1) % 128];
  }
  if (F == Simple::kReadOnly) const_cast<float*>(p.in)[t] = sum;
  p.out[t] = sum;
}

template <Simple F>
bool run_reverse() {
  Global<float> out(128);
  std::vector<float> values(128);
  for (size_t i = 0; i < 128; ++i) values[i] = static_cast<float>(i);
  const emulator::GlobalRange in(values.data(), 128 * sizeof(float), false);
  launch(reverse<F>, Grid{.threads = 128, .shared_bytes = 512}, SimpleParams{values.data(), out.data()});
  for (size_t i = 0; i < 128; ++i) {
    if (out[i] != static_cast<float>(127 - i + 127 - (i + 1) % 128)) return false;
  }
  return true;
}

enum class InWarp { kRight, kNoSyncwarp, kDivergent, kAbsentLane, kReturned, kMixedMasks, kNotInMask };

template <InWarp F>
__global__ void __launch_bounds__(64, 1) in_warp(const __grid_constant__ SimpleParams p) {
  auto* const tile = reinterpret_cast<float*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  if (F == InWarp::kReturned && t == 40) return;
  float x = p.in[t];
  tile[t] = x;
  if (F != InWarp::kNoSyncwarp) __syncwarp();
  x += tile[t ^ 1];
  if (F == InWarp::kDivergent && lane < 16) {
    x += __shfl_down_sync(0xffffffffu, x, 1);
  } else if (F == InWarp::kMixedMasks && lane < 16) {
    x += __shfl_xor_sync(0x0000ffffu, x, 2);
  } else if (F == InWarp::kAbsentLane) {
    x += lane < 16 ? __shfl_xor_sync(0x0000ffffu, x, 16) : 0.0f;
  } else if (F == InWarp::kNotInMask) {
    x += __shfl_xor_sync(0x7fffffffu, x, 0);
  } else {
    x += __shfl_xor_sync(0xffffffffu, x, 2);
  }
  const unsigned ballot = __ballot_sync(0xffffffffu, lane % 3 == 0);
  p.out[t] = x + static_cast<float>(__popc(ballot));
}

template <InWarp F>
bool run_in_warp() {
  Global<float> in(64), out(64);
  for (size_t i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  launch(in_warp<F>, Grid{.threads = 64, .shared_bytes = 256}, SimpleParams{in.data(), out.data()});
  for (size_t i = 0; i < 64; ++i) {
    const size_t j = i ^ 2;
    if (out[i] != static_cast<float>(i + (i ^ 1) + j + (j ^ 1) + 11)) return false;
  }
  return true;
}

enum class Named { kRight, kWrongCount, kMissing, kTwice, kPartOfWarp, kReadsBefore, kDivergentSync };

// Warps 0 and 1 fill, warps 2 and 3 read; then all four together.
template <Named F>
__global__ void __launch_bounds__(128, 1) named(const __grid_constant__ SimpleParams p) {
  auto* const tile = reinterpret_cast<float*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x);
  if (t < 64) {
    tile[t] = p.in[t];
    if (F == Named::kTwice && t == 3) named_arrive(1, 128);
    if (F != Named::kMissing || t >= 32) named_arrive(1, F == Named::kWrongCount && t >= 32 ? 96 : 128);
  } else {
    if (F != Named::kReadsBefore) named_sync(1, 128);
    p.out[t] = tile[t - 64];
    if (F == Named::kReadsBefore) named_sync(1, 128);
  }
  if (F == Named::kDivergentSync && t % 2 == 0) {
    named_sync(2, 128);
  } else {
    __syncthreads();
  }
  if (t < 64) p.out[t] = tile[63 - t];
}

template <Named F>
bool run_named() {
  Global<float> in(64), out(128);
  for (size_t i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  launch(named<F>, Grid{.threads = 128, .shared_bytes = 256}, SimpleParams{in.data(), out.data()});
  for (size_t i = 0; i < 128; ++i) {
    if (out[i] != static_cast<float>(i < 64 ? 63 - i : i - 64)) return false;
  }
  return true;
}

struct FlagParams {
  int* flag;
  int* out;
};

// Block 0 waits for what the last block says. All of them have to be resident, whatever the order.
template <bool kNeverSet>
__global__ void __launch_bounds__(32, 1) flags(const __grid_constant__ FlagParams p) {
  const int last = static_cast<int>(gridDim.x) - 1, block = static_cast<int>(blockIdx.x);
  if (threadIdx.x != 0) return;
  if (block == last && !kNeverSet) atomicExch(p.flag, 7);
  if (block == 0) {
    while (atomicAdd(p.flag, 0) == 0) __nanosleep(20);
    p.out[0] = *p.flag;
  }
  atomicAdd(p.out + 1, 1);
}

template <bool kNeverSet>
bool run_flags() {
  Global<int> flag(1), out(2);
  launch(flags<kNeverSet>, Grid{.blocks = {5}, .threads = 32}, FlagParams{flag.data(), out.data()});
  return out[0] == 7 && out[1] == 5;
}

template <int kConsumer>
__global__ void __launch_bounds__(384, 1) registers(const __grid_constant__ FlagParams p) {
  if (threadIdx.x < 128) {
    lower_registers<24>();
  } else {
    raise_registers<kConsumer>();
  }
  atomicAdd(p.out, 1);
}

template <int kConsumer>
bool run_registers() {
  Global<int> out(1);
  launch(registers<kConsumer>, Grid{.threads = 384}, FlagParams{nullptr, out.data()});
  return out[0] == 384;
}

// Integers by shared atomics: needs no order, but for the reads at the end.
template <bool kNoSync>
__global__ void __launch_bounds__(128, 1) counting(const __grid_constant__ FlagParams p) {
  auto* const bins = reinterpret_cast<int*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x);
  if (t < 4) bins[t] = 0;
  __syncthreads();
  atomicAdd(bins + t % 4, t);
  if (!kNoSync) __syncthreads();
  if (t < 4) p.out[t] = bins[t];
}

template <bool kNoSync>
bool run_counting() {
  Global<int> out(4);
  launch(counting<kNoSync>, Grid{.threads = 128, .shared_bytes = 16}, FlagParams{nullptr, out.data()});
  return out[0] == 1984 && out[1] == 2016 && out[2] == 2048 && out[3] == 2080;
}

}  // namespace

std::vector<Case> simple_cases() {
  return {
      {"reverse", "", run_reverse<Simple::kRight>},
      {"reverse without __syncthreads", "race: a |which nothing has written", run_reverse<Simple::kNoSyncthreads>},
      {"reverse without __syncthreads before reuse", "race: a ", run_reverse<Simple::kNoSyncBeforeReuse>},
      {"store past the end of shared memory", "outside the block's 512 bytes", run_reverse<Simple::kSharedOutOfBounds>},
      {"read of unwritten shared memory", "which nothing has written", run_reverse<Simple::kUnwritten>},
      {"global read one past the end", "reads global memory out of bounds: 4 bytes at byte 512 of a tensor of 512",
       run_reverse<Simple::kGlobalPastEnd>},
      {"global read before the start", "reads global memory out of bounds: 4 bytes at byte -4",
       run_reverse<Simple::kGlobalBeforeStart>},
      {"store to a read-only tensor", "that the kernel may only read", run_reverse<Simple::kReadOnly>},
      {"misaligned vector", "at the misaligned address", run_reverse<Simple::kMisaligned>},
      {"warp", "", run_in_warp<InWarp::kRight>},
      {"warp without __syncwarp", "race: a |which nothing has written", run_in_warp<InWarp::kNoSyncwarp>},
      {"divergent shuffle", "divergent warp", run_in_warp<InWarp::kDivergent>},
      {"shuffles with masks that overlap", "divergent warp", run_in_warp<InWarp::kMixedMasks>},
      {"shuffle from a lane that does not take part", "which does not take part", run_in_warp<InWarp::kAbsentLane>},
      {"shuffle whose mask lacks the lane", "which lacks its own lane", run_in_warp<InWarp::kNotInMask>},
      {"shuffle with a lane that returned", "return", run_in_warp<InWarp::kReturned>},
      {"named barriers", "", run_named<Named::kRight>},
      {"named barrier with two counts", "named barrier 1 is used for", run_named<Named::kWrongCount>},
      {"named barrier that a warp misses", "deadlock", run_named<Named::kMissing>},
      {"named barrier, arrival twice", "arrives twice at named barrier 1", run_named<Named::kTwice>},
      {"named barrier after the read", "reads shared byte", run_named<Named::kReadsBefore>},
      {"half of each warp at another barrier", "deadlock", run_named<Named::kDivergentSync>},
      {"a flag from another block", "", run_flags<false>},
      {"a flag that nobody sets", "deadlock", run_flags<true>},
      {"registers", "", run_registers<240>},
      {"more registers than there are", "setmaxnreg", run_registers<256>},
      {"shared atomics", "", run_counting<false>},
      {"shared atomics read too early", "race: a", run_counting<true>},
  };
}

}  // namespace tilewright::emulator_tests
