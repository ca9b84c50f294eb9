// SPDX-License-Identifier: Apache-2.0
// Which thread runs next. A warp runs while it can, warps take turns by priorities that change at random: a uniform choice
// among threads would keep all warps equally far and hide what depends on one being ahead.
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

#include "emulator/memory.h"
#include "emulator/state.h"

tilewright::emulator::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace tilewright::emulator {

Machine* machine = nullptr;
thread_local Fiber* current __attribute__((tls_model("initial-exec"))) = nullptr;
thread_local Fiber* watched __attribute__((tls_model("initial-exec"))) = nullptr;

uint64_t random_below(uint64_t limit) { return machine->random() % limit; }

std::string place(const Fiber& fiber) {
  char text[160];
  const Block& block = *fiber.block;
  std::snprintf(text, sizeof(text), "block (%u, %u, %u), thread %d (warp %d, lane %d)", block.index.x, block.index.y,
                block.index.z, fiber.thread, fiber.warp(), fiber.lane());
  return text;
}

// The thread never runs again: nothing on its stack owns memory that anybody else needs.
void abandon(std::string message) {
  if (machine->error.empty()) machine->error = std::move(message);
  Fiber* fiber = current;
  fiber->state = Fiber::State::kDone;
  switch_context(fiber->context, machine->scheduler);
  __builtin_unreachable();
}

void kernel_error(const char* format, ...) {
  const Unwatched inside;
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (current == nullptr) throw std::runtime_error(std::string("emulator: ") + text);
  std::string message = place(*current) + ": " + text;
  if (instruction != nullptr) {
    std::snprintf(text, sizeof(text), " [instruction 0x%zx]", image_offset(std::exchange(instruction, nullptr)));
    message += text;
  }
  abandon(std::move(message));
}

void park(const char* doing, const void* waits_for, uint64_t detail) {
  Fiber* fiber = current;
  fiber->state = Fiber::State::kParked;
  fiber->doing = doing;
  fiber->waits_for = waits_for;
  fiber->waits_detail = detail;
  ++fiber->block->cluster->progress;
  switch_context(fiber->context, machine->scheduler);
}

void wake(Fiber* fiber) {
  fiber->state = Fiber::State::kReady;
  fiber->block->warps[fiber->warp()].ready.push_back(fiber);
  ++fiber->block->cluster->ready;
}

// The thread asks again once nobody else can run.
void poll_again() {
  Fiber* fiber = current;
  fiber->state = Fiber::State::kPolling;
  fiber->block->cluster->polling.push_back(fiber);
  switch_context(fiber->context, machine->scheduler);
}

void pause_thread() {
  const Unwatched inside;
  current->doing = "a loop that waits for another thread (atomics, __nanosleep or volatile reads)";
  poll_again();
}

namespace {

Fiber* pick(Cluster& cluster) {
  if (random_below(32) == 0)
    cluster.warps[random_below(cluster.warps.size())]->priority = static_cast<uint32_t>(machine->random());
  Warp* best = nullptr;
  for (Warp* warp : cluster.warps) {
    if (!warp->ready.empty() && (best == nullptr || warp->priority > best->priority)) best = warp;
  }
  const uint64_t at = random_below(best->ready.size());
  Fiber* fiber = best->ready[at];
  best->ready[at] = best->ready.back();
  best->ready.pop_back();
  --cluster.ready;
  return fiber;
}

void resume(Fiber& fiber) {
  fiber.state = Fiber::State::kRunning;
  current = &fiber;
  threadIdx = fiber.index;
  blockIdx = fiber.block->index;
  switch_context(machine->scheduler, fiber.context);
  current = nullptr;
}

void land_one(Cluster& cluster) {
  const uint64_t at = random_below(cluster.flights.size());
  std::swap(cluster.flights[at], cluster.flights.back());
  const std::unique_ptr<Flight> flight = std::move(cluster.flights.back());
  cluster.flights.pop_back();
  ++cluster.progress;
  try {
    flight->land();
  } catch (const std::runtime_error& error) {
    machine->error = error.what();
  }
}

void fiber_main() {
  watched = current;
  machine->body(machine->call);
  watched = nullptr;
  thread_ends();
  current->state = Fiber::State::kDone;
  switch_context(current->context, machine->scheduler);
  __builtin_unreachable();
}

enum class Outcome { kDone, kPolling, kError };

// Until the cluster has ended or only waits for others. Copies land when nobody can run any more: as late as can be.
Outcome run_cluster(Cluster& cluster) {
  while (true) {
    while (cluster.ready > 0) {
      resume(*pick(cluster));
      if (!machine->error.empty()) return Outcome::kError;
    }
    if (cluster.alive == 0) return Outcome::kDone;
    if (!cluster.polling.empty() && cluster.polled != cluster.progress) {
      cluster.polled = cluster.progress;
      for (Fiber* fiber : std::exchange(cluster.polling, {})) wake(fiber);
    } else if (!cluster.flights.empty()) {
      land_one(cluster);
      if (!machine->error.empty()) return Outcome::kError;
    } else if (!cluster.polling.empty()) {
      return Outcome::kPolling;
    } else {
      machine->error = deadlock_report(cluster);
      return Outcome::kError;
    }
  }
}

std::unique_ptr<Fiber> new_fiber(Block& block, int thread) {
  std::unique_ptr<Fiber> fiber;
  if (machine->spare_fibers.empty()) {
    fiber = std::make_unique<Fiber>();
    fiber->stack = std::make_unique<Stack>();
  } else {
    fiber = std::move(machine->spare_fibers.back());
    machine->spare_fibers.pop_back();
    auto stack = std::move(fiber->stack);
    const uint32_t clock = fiber->clock + 1;  // goes on, so that old stamps are never in the future
    *fiber = Fiber{};
    fiber->stack = std::move(stack);
    fiber->clock = clock;
  }
  fiber->block = &block;
  fiber->thread = thread;
  fiber->index = {static_cast<unsigned>(thread), 0, 0};
  fiber->context = new_context(*fiber->stack, &fiber_main);
  return fiber;
}

std::unique_ptr<Block> new_block(Cluster& cluster, int64_t serial, int rank) {
  const GridShape& shape = machine->shape;
  auto block = std::make_unique<Block>();
  block->cluster = &cluster;
  block->rank = rank;
  block->serial = serial;
  block->index = {static_cast<unsigned>(serial % shape.blocks_x),
                  static_cast<unsigned>(serial / shape.blocks_x % shape.blocks_y),
                  static_cast<unsigned>(serial / shape.blocks_x / shape.blocks_y)};
  take_shared(block->shared, static_cast<uint32_t>(shape.shared_bytes));
  block->warps.resize((shape.threads + 31) / 32);
  block->groups = std::vector<WarpGroup>((shape.threads + 127) / 128);
  block->alive = shape.threads;
  for (int t = 0; t < shape.threads; ++t) block->fibers.push_back(new_fiber(*block, t));
  for (Warp& warp : block->warps) warp.priority = static_cast<uint32_t>(machine->random());
  return block;
}

std::unique_ptr<Cluster> new_cluster(int64_t serial) {
  auto cluster = std::make_unique<Cluster>();
  cluster->components = static_cast<size_t>(machine->shape.cluster * machine->shape.threads);
  for (int rank = 0; rank < machine->shape.cluster; ++rank) {
    cluster->blocks.push_back(new_block(*cluster, serial * machine->shape.cluster + rank, rank));
    Block& block = *cluster->blocks.back();
    cluster->alive += block.alive;
    for (Warp& warp : block.warps) cluster->warps.push_back(&warp);
    for (auto& fiber : block.fibers) wake(fiber.get());
  }
  return cluster;
}

void end_cluster(Cluster& cluster) {
  for (auto& block : cluster.blocks) {
    for (auto& fiber : block->fibers) machine->spare_fibers.push_back(std::move(fiber));
  }
}

}  // namespace

constexpr int kResidentBlocks = 132;  // at once: those of an H100 with one block on each multiprocessor
constexpr int kIdleRounds = 2000;  // of all pollers, before they are said to wait in vain

// Clusters run one after the other, in random order (in order for seed 0); another starts where one waits for others.
void run_clusters(std::vector<int64_t> order) {
  auto& running = machine->running;
  size_t next = 0, idle = 0;
  while (true) {
    const bool room = static_cast<int>(running.size() + 1) * machine->shape.cluster <= kResidentBlocks;
    if (next < order.size() && (running.empty() || (idle > running.size() && room))) {
      running.push_back(new_cluster(order[next++]));
      idle = 0;
    }
    if (running.empty()) return;
    const size_t at = random_below(running.size());
    Cluster& cluster = *running[at];
    const uint64_t before = cluster.progress;
    for (Fiber* fiber : std::exchange(cluster.polling, {})) wake(fiber);
    const Outcome outcome = run_cluster(cluster);
    if (outcome == Outcome::kError) return;
    idle = cluster.progress == before ? idle + 1 : 0;
    if (outcome == Outcome::kDone) {
      end_cluster(cluster);
      running.erase(running.begin() + static_cast<std::ptrdiff_t>(at));
      idle = 0;
    } else if (idle > kIdleRounds * running.size()) {
      machine->error = deadlock_report(cluster);
      return;
    }
  }
}

}  // namespace tilewright::emulator
