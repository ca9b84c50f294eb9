// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory (mbarrier), named barriers of parts of a block, cluster barriers, proxies, registers.
#pragma once

#include "hopper/shared.h"

namespace tilewright::hopper {

// One phase ends when every expected thread has arrived and every announced byte has come. A waiter gives the parity of the
// phase that it waits for: 0 first, then 1, 0, ...
struct alignas(8) Barrier {
  uint64_t word;
};

// Where a ring of stages stands.
template <int Stages>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;

  TILEWRIGHT_BOTH void advance() {
    if (++stage == Stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

#if defined(__CUDACC__)

TILEWRIGHT_DEVICE void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// One thread, after the last init and before the block's (or cluster's) next barrier: makes them visible to the copy
// engine and to other blocks of the cluster.
TILEWRIGHT_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

TILEWRIGHT_DEVICE void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives and announces bytes that copies will bring.
TILEWRIGHT_DEVICE void arrive_expect(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Arrives at the same barrier of another block of the cluster. The other block may overwrite what this thread has read; it
// may not read what this thread has written: that would take a fence of the whole device at each arrival.
TILEWRIGHT_DEVICE void arrive_cluster(Barrier& barrier, int block) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(&barrier)),
      "r"(block)
      : "memory");
}

TILEWRIGHT_DEVICE bool try_wait(Barrier& barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(&barrier)), "r"(phase)
      : "memory");
  return done != 0;
}

TILEWRIGHT_DEVICE void wait(Barrier& barrier, uint32_t phase) {
  while (!try_wait(barrier, phase)) {
  }
}

// Barriers 1 to 15 of a block, for a multiple of 32 threads; 0 is __syncthreads'.
TILEWRIGHT_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
TILEWRIGHT_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Ordinary stores to shared memory by this thread become visible to wgmma and the copy engine; a barrier follows.
TILEWRIGHT_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

TILEWRIGHT_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
TILEWRIGHT_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What lies at the same place of another block's shared memory; that block must have written it before a cluster_sync(), and
// must not leave before the next.
TILEWRIGHT_DEVICE int32_t load_cluster(const int32_t* shared, int block) {
  int32_t value;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.b32 %0, [remote];\n}"
      : "=r"(value)
      : "r"(shared_address(shared)), "r"(block)
      : "memory");
  return value;
}
TILEWRIGHT_DEVICE float load_cluster(const float* shared, int block) {
  return __int_as_float(load_cluster(reinterpret_cast<const int32_t*>(shared), block));
}

// A warpgroup gives registers back or takes more; N is a multiple of 8. Every warp of the group calls it.
template <int N>
TILEWRIGHT_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
TILEWRIGHT_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// A kernel launched with Grid::overlap starts while the one before it still runs: it waits here before it reads what that
// one wrote.
TILEWRIGHT_DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
TILEWRIGHT_DEVICE void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#else
#include "emulator/barrier.h"
#endif

}  // namespace tilewright::hopper
