// SPDX-License-Identifier: Apache-2.0
// mbarrier: arrivals and bytes of a phase. The words in shared memory only mark the place; the state is here.
#include <algorithm>
#include <cstring>

#include "emulator/state.h"

namespace tilewright::emulator {
namespace {

constexpr int kMaxArrivals = (1 << 20) - 1;

void check_phase_end(Block& block, MBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  if (!barrier.unseen.empty()) {
    kernel_error(
        "ends phase %llu of the barrier at shared byte %u before thread %d has seen the end of the phase before "
        "it: a waiter can miss both",
        static_cast<unsigned long long>(barrier.phase), barrier.offset, barrier.unseen.front()->thread);
  }
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.announced = 0;
  barrier.who.clear();
  barrier.passed_on = barrier.released.take();
  barrier.unseen = std::exchange(barrier.waiting, {});
  for (Fiber* fiber : barrier.unseen) wake(fiber);
  block.cluster->progress++;
}

void arrive_at(Block& block, MBarrier& barrier, int who, uint32_t bytes) {
  release(*current, barrier.released);
  if (barrier.pending == 0) {
    kernel_error(
        "arrives at the barrier at shared byte %u, whose phase %llu has all its %d arrivals already (%lld bytes "
        "are still to come)",
        barrier.offset, static_cast<unsigned long long>(barrier.phase), barrier.count,
        static_cast<long long>(barrier.bytes));
  }
  // A barrier for many threads counts each of them once; one for a few may be armed several times by its producer.
  if (barrier.count >= 32 && std::find(barrier.who.begin(), barrier.who.end(), who) != barrier.who.end()) {
    kernel_error("arrives twice in phase %llu of the barrier at shared byte %u (%d of %d arrivals missing)",
                 static_cast<unsigned long long>(barrier.phase), barrier.offset, barrier.pending, barrier.count);
  }
  barrier.who.push_back(who);
  barrier.bytes += bytes;
  barrier.announced += bytes;
  --barrier.pending;
  check_phase_end(block, barrier);
}

}  // namespace

MBarrier& barrier_at(Block& block, const void* pointer, const char* what) {
  const uint32_t offset = shared_offset(block, pointer, 8, what);
  const auto at = block.barriers.find(offset);
  if (at == block.barriers.end()) {
    kernel_error("%s: there is no barrier at shared byte %u; init() was not called for it, or not yet", what, offset);
  }
  if (!knows(*current, at->second.made_by, at->second.made_at)) {
    kernel_error(
        "%s of the barrier at shared byte %u, but nothing orders its init() before this (no __syncthreads() "
        "or cluster_sync() between)",
        what, offset);
  }
  return at->second;
}

void barrier_init(void* barrier, int arrivals) {
  const Unwatched inside;
  Block& block = this_block();
  const uint32_t offset = shared_offset(block, barrier, 8, "init of a barrier");
  if (offset % 8 != 0) kernel_error("a barrier at shared byte %u; a multiple of 8 is needed", offset);
  if (arrivals < 1 || arrivals > kMaxArrivals) {
    kernel_error("a barrier for %d arrivals; 1 to %d are possible", arrivals, kMaxArrivals);
  }
  if (block.barriers.contains(offset))
    kernel_error("init of the barrier at shared byte %u, which is one already", offset);
  for (uint32_t i = offset; i < offset + 8; ++i) {
    if ((block.shared.flags[i] & kInFlight) != 0) kernel_error("a barrier where a copy is on its way (byte %u)", i);
    block.shared.flags[i] = kBarrierWord;
  }
  MBarrier& state = block.barriers[offset];
  state.offset = offset;
  state.component = new_component(*block.cluster);
  state.made_by = component_of(*current);
  state.made_at = current->count;
  state.count = state.pending = arrivals;
}

void fence_barrier_init() {
  const Unwatched inside;
  for (auto& [offset, barrier] : this_block().barriers) barrier.fenced = true;
}

void barrier_arrive(void* barrier, uint32_t expected_bytes, bool expects) {
  const Unwatched inside;
  MBarrier& state = barrier_at(this_block(), barrier, expects ? "arrive_expect" : "arrive");
  arrive_at(this_block(), state, current->thread, expected_bytes);
}

void barrier_arrive_cluster(void* barrier, int rank) {
  const Unwatched inside;
  Cluster& cluster = *this_block().cluster;
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) {
    kernel_error("arrive_cluster: block %d of a cluster of %zu", rank, cluster.blocks.size());
  }
  Block& target = *cluster.blocks[rank];
  const uint32_t offset = shared_offset(this_block(), barrier, 8, "arrive_cluster");
  const auto at = target.barriers.find(offset);
  if (at == target.barriers.end()) {
    kernel_error(
        "arrive_cluster: block %d of the cluster has no barrier at shared byte %u (yet: a cluster_sync() after "
        "init is needed)",
        rank, offset);
  }
  if (!knows(*current, at->second.made_by, at->second.made_at)) {
    kernel_error(
        "arrive_cluster: nothing orders the init() of block %d's barrier at shared byte %u before this (no "
        "cluster_sync() between)",
        rank, offset);
  }
  arrive_at(target, at->second, current->thread + this_block().rank * kMaxThreads, 0);
}

void bytes_came(Block& block, uint32_t barrier_offset, int64_t bytes) {
  MBarrier& barrier = block.barriers.at(barrier_offset);
  barrier.bytes -= bytes;
  if (barrier.pending == 0 && barrier.bytes < 0) {
    machine->error = "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
                     std::to_string(block.index.z) + "): " + std::to_string(-barrier.bytes) +
                     " more bytes came to the barrier at shared byte " + std::to_string(barrier_offset) + " than the " +
                     std::to_string(barrier.announced) + " that were announced";
    return;
  }
  check_phase_end(block, barrier);
}

bool barrier_test(void* barrier, uint32_t parity) {
  const Unwatched inside;
  MBarrier& state = barrier_at(this_block(), barrier, "try_wait");
  if ((state.phase & 1) != (parity & 1)) {
    acquire(*current, state.passed_on);
    return true;
  }
  current->doing = "try_wait";
  current->waits_for = &state;
  current->waits_detail = parity;
  poll_again();
  if ((state.phase & 1) == (parity & 1)) return false;
  acquire(*current, state.passed_on);
  return true;
}

void barrier_wait(void* barrier, uint32_t parity) {
  const Unwatched inside;
  MBarrier& state = barrier_at(this_block(), barrier, "wait");
  if (parity > 1) kernel_error("waits for parity %u of the barrier at shared byte %u; 0 or 1", parity, state.offset);
  if ((state.phase & 1) == parity) {
    state.waiting.push_back(current);
    park("wait", &state, parity);
    std::erase(state.unseen, current);
  }
  acquire(*current, state.passed_on);
}

}  // namespace tilewright::emulator
