// SPDX-License-Identifier: Apache-2.0
// Threads of a block and of a cluster that wait for each other; the end of a thread; what a deadlock looks like.
#include <cstdio>
#include <map>

#include "emulator/state.h"

namespace tilewright::emulator {

void finish_named(NamedBarrier& barrier, const Fiber* running) {
  const Clock clock = barrier.released.take();
  for (Fiber* fiber : barrier.waiting) {
    acquire(*fiber, clock);
    fiber->vote_result = barrier.predicate_count;
    if (fiber != running) wake(fiber);
  }
  barrier = NamedBarrier{};
}

namespace {

void enter_named(NamedBarrier& barrier, int id, int needed) {
  if (barrier.arrived > 0 && barrier.needed != needed) {
    kernel_error("named barrier %d is used for %d threads here, but others wait at it for %d", id, needed,
                 barrier.needed);
  }
  if (barrier.who[current->thread]) {
    kernel_error("arrives twice at named barrier %d before the other threads came (%d of %d)", id, barrier.arrived,
                 needed);
  }
  barrier.needed = needed;
  barrier.who[current->thread] = true;
  release(*current, barrier.released);
  ++barrier.arrived;
}

// The last thread to come goes on at once.
void end_by_last(NamedBarrier& barrier) {
  Fiber& fiber = *current;
  barrier.waiting.push_back(&fiber);
  finish_named(barrier, &fiber);
}

void check_named(int id, int threads) {
  if (id < 0 || id > 15) kernel_error("named barrier %d: a block has 0 to 15", id);
  if (threads <= 0 || threads % 32 != 0 || threads > machine->shape.threads) {
    kernel_error("named barrier %d for %d threads: a multiple of 32 up to the block's %d is needed", id, threads,
                 machine->shape.threads);
  }
}

void sync_all(bool predicate) {
  NamedBarrier& barrier = this_block().named[0];
  enter_named(barrier, 0, 0);
  barrier.predicate_count += predicate ? 1 : 0;
  if (barrier.arrived == this_block().alive) {
    end_by_last(barrier);
    return;
  }
  barrier.waiting.push_back(current);
  park("__syncthreads", &barrier);
}

}  // namespace

void block_sync() {
  const Unwatched inside;
  sync_all(false);
}

int block_sync_count(bool predicate) {
  const Unwatched inside;
  sync_all(predicate);
  return current->vote_result;
}

void named_sync(int id, int threads) {
  const Unwatched inside;
  check_named(id, threads);
  NamedBarrier& barrier = this_block().named[id];
  enter_named(barrier, id, threads);
  if (barrier.arrived == threads) {
    end_by_last(barrier);
    return;
  }
  barrier.waiting.push_back(current);
  park("named_sync", &barrier, static_cast<uint64_t>(id));
}

void named_arrive(int id, int threads) {
  const Unwatched inside;
  check_named(id, threads);
  NamedBarrier& barrier = this_block().named[id];
  enter_named(barrier, id, threads);
  if (barrier.arrived == threads) finish_named(barrier);
}

void cluster_sync() {
  const Unwatched inside;
  Cluster& cluster = *this_block().cluster;
  ++cluster.sync.arrived;
  release(*current, cluster.sync.released);
  if (cluster.sync.arrived == cluster.alive) {
    end_by_last(cluster.sync);
    return;
  }
  cluster.sync.waiting.push_back(current);
  park("cluster_sync", &cluster.sync);
}

int cluster_rank() { return this_block().rank; }
int alive_threads() { return this_block().alive; }

// Threads that returned count as arrived at __syncthreads and cluster_sync, and leave nothing behind.
void thread_ends() {
  const Unwatched inside;
  Fiber& fiber = *current;
  products_end(fiber);
  copies_end(fiber);
  Block& block = *fiber.block;
  Cluster& cluster = *block.cluster;
  Warp& warp = block.warps[fiber.warp()];
  warp.done |= 1u << fiber.lane();
  for (const auto& meeting : warp.meetings) {
    if ((meeting->mask >> fiber.lane()) & 1u) {
      kernel_error("returns while lanes of its warp wait for it in %s (mask %08x)", meeting->name, meeting->mask);
    }
  }
  --block.alive;
  --cluster.alive;
  ++cluster.progress;
  if (cluster.alive == 0 && !cluster.flights.empty()) {
    kernel_error("the block ends while %s is on its way: nobody waited for it", cluster.flights.front()->what.c_str());
  }
  if (block.named[0].arrived > 0 && block.named[0].arrived == block.alive) finish_named(block.named[0]);
  if (cluster.sync.arrived > 0 && cluster.sync.arrived == cluster.alive) finish_named(cluster.sync);
}

namespace {

std::string ranges(const std::vector<int>& threads) {
  std::string text;
  for (size_t i = 0; i < threads.size();) {
    size_t end = i + 1;
    while (end < threads.size() && threads[end] == threads[end - 1] + 1) ++end;
    if (!text.empty()) text += ", ";
    text += std::to_string(threads[i]);
    if (end - i > 1) text.append("-").append(std::to_string(threads[end - 1]));
    i = end;
  }
  return text;
}

std::string barrier_state(const MBarrier& barrier) {
  char text[320];
  std::snprintf(text, sizeof(text), "phase %llu: %d of %d arrivals missing",
                static_cast<unsigned long long>(barrier.phase), barrier.pending, barrier.count);
  std::string result = text;
  if (barrier.pending == barrier.count && barrier.announced == 0) result += ", never armed in this phase";
  if (barrier.bytes > 0) result += ", " + std::to_string(barrier.bytes) + " announced bytes never came";
  if (barrier.bytes < 0) result += ", " + std::to_string(-barrier.bytes) + " more bytes came than were announced";
  return result;
}

std::string waiting_for(const Fiber& fiber) {
  const Block& block = *fiber.block;
  const std::string doing = fiber.doing;
  for (const auto& [offset, barrier] : block.barriers) {
    if (fiber.waits_for != &barrier) continue;
    return doing + " of the barrier at shared byte " + std::to_string(offset) + " for parity " +
           std::to_string(fiber.waits_detail) + " (" + barrier_state(barrier) + ")";
  }
  for (int id = 0; id < 16; ++id) {
    if (fiber.waits_for != &block.named[id]) continue;
    const NamedBarrier& barrier = block.named[id];
    const int needed = id == 0 && barrier.needed == 0 ? block.alive : barrier.needed;
    return doing + " at named barrier " + std::to_string(id) + " (" + std::to_string(barrier.arrived) + " of " +
           std::to_string(needed) + " threads came)";
  }
  return doing;
}

}  // namespace

std::string deadlock_report(const Cluster& cluster) {
  std::string text = "deadlock: no thread can run and nothing is on its way";
  for (const auto& block : cluster.blocks) {
    std::map<std::string, std::vector<int>> groups;
    for (const auto& fiber : block->fibers) {
      if (fiber->state == Fiber::State::kDone) continue;
      groups[waiting_for(*fiber)].push_back(fiber->thread);
    }
    for (const auto& [what, threads] : groups) {
      text += "; block (" + std::to_string(block->index.x) + ", " + std::to_string(block->index.y) + ", " +
              std::to_string(block->index.z) + ") threads " + ranges(threads) + " are in " + what;
    }
  }
  return text;
}

}  // namespace tilewright::emulator
