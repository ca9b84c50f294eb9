// SPDX-License-Identifier: Apache-2.0
// Accesses to shared memory that nothing orders: of two threads, one of them writing, or of a thread and a copy for whose
// barrier it did not wait.
#include "emulator/state.h"

namespace tilewright::emulator {

size_t component_of(const Fiber& fiber) {
  return static_cast<size_t>(fiber.block->rank * machine->shape.threads + fiber.thread);
}

// Histories name components by 16 bits; whoever has that many barriers shares the last.
size_t new_component(Cluster& cluster) { return cluster.components < 0xffff ? cluster.components++ : 0xffff - 1; }

void release(Fiber& fiber, Gathering& to) {
  const size_t components = fiber.block->cluster->components;
  to.add(fiber.told, components);
  to.add(component_of(fiber), fiber.count, components);
  ++fiber.count;
}

void acquire(Fiber& fiber, const Clock& clock) {
  if (clock != nullptr) fiber.told = join(fiber.told, clock);
}

bool knows(const Fiber& fiber, size_t component, uint32_t count) {
  if (count == 0 || component == component_of(fiber)) return true;
  return fiber.told != nullptr && component < fiber.told->size() && (*fiber.told)[component] >= count;
}

namespace {

std::string accessor(const Block& block, size_t component) {
  const auto threads = static_cast<size_t>(machine->shape.threads);
  const size_t blocks = block.cluster->blocks.size();
  if (component < threads * blocks) {
    std::string text = "thread " + std::to_string(component % threads);
    if (blocks > 1) text += " of the cluster's block " + std::to_string(component / threads);
    return text;
  }
  for (const auto& other : block.cluster->blocks) {
    for (const auto& [offset, barrier] : other->barriers) {
      if (barrier.component == component) return "a copy to the barrier at shared byte " + std::to_string(offset);
    }
  }
  return "a copy";
}

[[noreturn, gnu::noinline]] void report_race(const Block& block, uint32_t offset, bool writes, const char* what) {
  const ByteHistory& byte = block.shared.history[offset];
  const bool by_writer = !knows(*current, byte.writer, byte.write_count);
  const size_t other = by_writer ? byte.writer : byte.reader;
  const bool copy = other >= block.cluster->blocks.size() * static_cast<size_t>(machine->shape.threads);
  kernel_error("race: %s %s shared byte %u, which %s %s, and %s", what, writes ? "writes" : "reads", offset,
               accessor(block, other).c_str(), by_writer ? "wrote" : "reads",
               copy ? "this thread has not waited for that barrier, nor heard from one that did"
                    : "nothing orders the two (no barrier between)");
}

}  // namespace

void check_order(Block& block, uint32_t offset, uint32_t bytes, bool writes, const char* what) {
  const ByteHistory* history = block.shared.history.data() + offset;
  const auto self = static_cast<uint16_t>(component_of(*current));
  ByteHistory known{};  // of the byte before: neighbours mostly share their history
  for (uint32_t i = 0; i < bytes; ++i) {
    const ByteHistory& byte = history[i];
    if (byte.writer == known.writer && byte.write_count == known.write_count && byte.reader == known.reader &&
        byte.read_count == known.read_count) {
      continue;
    }
    known = byte;
    if (byte.writer != self && !knows(*current, byte.writer, byte.write_count))
      report_race(block, offset + i, writes, what);
    if (writes && byte.reader != self && !knows(*current, byte.reader, byte.read_count)) {
      report_race(block, offset + i, writes, what);
    }
  }
}

// Of an atomic, which needs no order with the atomic that wrote last, but does with plain reads.
void check_readers(Block& block, uint32_t offset, uint32_t bytes, const char* what) {
  const ByteHistory* history = block.shared.history.data() + offset;
  for (uint32_t i = 0; i < bytes; ++i) {
    if (knows(*current, history[i].reader, history[i].read_count)) continue;
    kernel_error("race: %s writes shared byte %u, which %s reads, and nothing orders the two (no barrier between)",
                 what, offset + i, accessor(block, history[i].reader).c_str());
  }
}

// Of several readers that nothing orders, one is remembered: any may be the one that a writer has not heard from.
void note_read(Block& block, uint32_t offset, uint32_t bytes) {
  ByteHistory* history = block.shared.history.data() + offset;
  const auto self = static_cast<uint16_t>(component_of(*current));
  static uint32_t coin = 1;
  coin = coin * 1664525u + 1013904223u;
  const bool replace = (coin >> 31) != 0;
  for (uint32_t i = 0; i < bytes; ++i) {
    ByteHistory& byte = history[i];
    if (byte.reader != self && !replace && !knows(*current, byte.reader, byte.read_count)) continue;
    byte.reader = self;
    byte.read_count = current->count;
  }
}

void note_write(Block& block, uint32_t offset, uint32_t bytes, bool generic) {
  ByteHistory* history = block.shared.history.data() + offset;
  const uint32_t stamp = generic ? ++block.cluster->stamp : 0;
  const auto self = static_cast<uint16_t>(component_of(*current));
  for (uint32_t i = 0; i < bytes; ++i) history[i] = {current->count, 0, stamp, self, 0};
}

}  // namespace tilewright::emulator
