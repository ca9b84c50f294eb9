// SPDX-License-Identifier: Apache-2.0
// What the bytes of shared memory are known to be, which global memory a kernel may touch, and the check of each access.
#include "emulator/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "emulator/control.h"
#include "emulator/state.h"

namespace tilewright::emulator {
namespace {

struct Range {
  uintptr_t low, high;
  bool writable;
};
std::vector<Range> global_ranges;
size_t last_range = 0;
std::vector<bool> slots_used(kSlots, false);

constexpr uintptr_t kRedZone =
    4096;  // around a registered range: close misses are errors even where others are let through

}  // namespace

uintptr_t shared_arena = 0;

namespace {

void make_arena() {
  void* mapping = mmap(nullptr, kSlots * kSlotBytes + kSlotBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::runtime_error("emulator: no address space for shared memory");
  shared_arena = (reinterpret_cast<uintptr_t>(mapping) + kSlotBytes - 1) / kSlotBytes * kSlotBytes;
}

}  // namespace

void take_shared(SharedMemory& shared, uint32_t bytes) {
  if (shared_arena == 0) make_arena();
  const auto free = std::find(slots_used.begin(), slots_used.end(), false);
  if (free == slots_used.end()) throw std::runtime_error("emulator: too many blocks at once");
  shared.slot = static_cast<int>(free - slots_used.begin());
  slots_used[shared.slot] = true;
  shared.bytes = bytes;
  shared.base = reinterpret_cast<char*>(shared_arena + shared.slot * kSlotBytes + kSlotMargin);
  std::memset(shared.base, 0xff, bytes);  // NaN in every float format
  shared.flags.assign(bytes + 8, 0);  // eight more, so that checks may look at eight at once
  shared.readers.assign(bytes + 8, 0);
  shared.history.assign(bytes, ByteHistory{});
}

void give_shared(SharedMemory& shared) {
  if (shared.slot >= 0) slots_used[shared.slot] = false;
  shared.slot = -1;
}

char* shared_memory() { return this_block().shared.base; }

uint32_t shared_address(const void* pointer) {
  const Unwatched inside;
  const Block& block = this_block();
  const auto offset = static_cast<int64_t>(static_cast<const char*>(pointer) - block.shared.base);
  if (offset < 0 || offset > static_cast<int64_t>(block.shared.bytes)) {
    kernel_error("shared_address of a pointer that is not into the block's %u bytes of shared memory (offset %lld)",
                 block.shared.bytes, static_cast<long long>(offset));
  }
  return kSharedBase + static_cast<uint32_t>(offset);
}

uint32_t shared_offset(const Block& block, const void* pointer, size_t bytes, const char* what) {
  const auto offset = static_cast<int64_t>(static_cast<const char*>(pointer) - block.shared.base);
  if (offset < 0 || offset + static_cast<int64_t>(bytes) > static_cast<int64_t>(block.shared.bytes)) {
    kernel_error("%s: bytes %lld to %lld are outside the block's %u bytes of shared memory", what,
                 static_cast<long long>(offset), static_cast<long long>(offset + static_cast<int64_t>(bytes)) - 1,
                 block.shared.bytes);
  }
  return static_cast<uint32_t>(offset);
}

namespace {

void report_shared(const Block& block, uint32_t offset, uint32_t bytes, bool writes, const char* what) {
  const SharedMemory& shared = block.shared;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    const uint8_t flags = shared.flags[i];
    if ((flags & kBarrierWord) != 0)
      kernel_error("%s %s the barrier at shared byte %u as data", what, writes ? "writes" : "reads", i);
    if ((flags & kInFlight) != 0) {
      kernel_error("%s %s shared byte %u while an asynchronous copy into it is on its way", what,
                   writes ? "writes" : "reads", i);
    }
    if (!writes && (flags & kWritten) == 0) kernel_error("%s reads shared byte %u, which nothing has written", what, i);
    if (writes && shared.readers[i] != 0) {
      kernel_error("%s writes shared byte %u while wgmma or an asynchronous store still reads it", what, i);
    }
  }
}

uint64_t eight(const std::vector<uint8_t>& bytes, uint32_t at) {
  uint64_t value;
  std::memcpy(&value, bytes.data() + at, 8);
  return value;
}

constexpr uint64_t every(uint8_t byte) { return 0x0101010101010101ull * byte; }

uint64_t first_bytes(uint32_t count) { return count >= 8 ? ~0ull : (1ull << (8 * count)) - 1; }

}  // namespace

void read_shared(Block& block, uint32_t offset, uint32_t bytes, const char* what) {
  for (uint32_t done = 0; done < bytes; done += 8) {
    const uint64_t mask = first_bytes(bytes - done);
    const uint64_t flags = eight(block.shared.flags, offset + done) & every(kWritten | kInFlight | kBarrierWord) & mask;
    if (flags != (every(kWritten) & mask)) report_shared(block, offset, bytes, false, what);
  }
  check_order(block, offset, bytes, false, what);
  note_read(block, offset, bytes);
}

void write_shared(Block& block, uint32_t offset, uint32_t bytes, const char* what) {
  SharedMemory& shared = block.shared;
  for (uint32_t done = 0; done < bytes; done += 8) {
    const uint64_t mask = first_bytes(bytes - done);
    uint64_t flags = eight(shared.flags, offset + done);
    const uint64_t wrong = (flags & every(kInFlight | kBarrierWord)) | eight(shared.readers, offset + done);
    if ((wrong & mask) != 0) report_shared(block, offset, bytes, true, what);
    flags = (flags & ~(every(kAtomic) & mask)) | (every(kWritten | kGeneric) & mask);
    std::memcpy(shared.flags.data() + offset + done, &flags, 8);
  }
  check_order(block, offset, bytes, true, what);
  note_write(block, offset, bytes, true);
}

// Through a wrapper or a hook; a pointer that is not into the arena is global.
void check_access(const void* pointer, size_t bytes, bool writes, const char* what) {
  const Unwatched inside;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address - shared_arena >= kSlots * kSlotBytes) {
    check_global_range(pointer, bytes, writes, what);
    return;
  }
  Block& block = this_block();
  if (static_cast<int>((address - shared_arena) / kSlotBytes) != block.shared.slot) {
    kernel_error("%s touches the shared memory of another block", what);
  }
  const uint32_t offset = shared_offset(block, pointer, bytes, what);
  if (writes) {
    write_shared(block, offset, static_cast<uint32_t>(bytes), what);
  } else {
    read_shared(block, offset, static_cast<uint32_t>(bytes), what);
  }
}

void check_read(const void* pointer, size_t bytes, const char* what) { check_access(pointer, bytes, false, what); }
void check_write(void* pointer, size_t bytes, const char* what) { check_access(pointer, bytes, true, what); }

void read_cluster(void* to, const void* shared, size_t bytes, int rank) {
  const Unwatched inside;
  constexpr const char* kWhat = "load_cluster";
  const Cluster& cluster = *this_block().cluster;
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) {
    kernel_error("%s: block %d of a cluster of %zu", kWhat, rank, cluster.blocks.size());
  }
  check_alignment(shared, bytes, kWhat);
  Block& source = *cluster.blocks[rank];
  if (source.alive == 0) kernel_error("%s: block %d of the cluster has returned", kWhat, rank);
  const uint32_t offset = shared_offset(this_block(), shared, bytes, kWhat);
  read_shared(source, offset, static_cast<uint32_t>(bytes), kWhat);
  std::memcpy(to, source.shared.base + offset, bytes);
}

void check_alignment(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return;
  kernel_error("%s at the misaligned address %p; a multiple of %zu is needed", what, pointer, bytes);
}

void check_global(const void* pointer, const char* what) {
  const Unwatched inside;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address - shared_arena < kSlots * kSlotBytes) kernel_error("%s of shared memory; it reads global memory", what);
  if (address % 16 != 0) kernel_error("%s of the misaligned address %p; a multiple of 16 is needed", what, pointer);
  check_global_range(pointer, 16, false, what);
}

void check_atomic(void* pointer, size_t bytes) {
  const Unwatched inside;
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    kernel_error("an atomic at the misaligned address %p", pointer);
  const auto offset = static_cast<size_t>(static_cast<char*>(pointer) - this_block().shared.base);
  if (offset + bytes > this_block().shared.bytes) {
    check_access(pointer, bytes, true, "an atomic");
    return;
  }
  // Atomics on one place need no order among themselves.
  SharedMemory& shared = this_block().shared;
  const auto at = static_cast<uint32_t>(offset);
  if ((shared.flags[at] & kAtomic) == 0) {
    read_shared(this_block(), at, static_cast<uint32_t>(bytes), "an atomic");
    write_shared(this_block(), at, static_cast<uint32_t>(bytes), "an atomic");
  }
  check_readers(this_block(), at, static_cast<uint32_t>(bytes), "an atomic");
  for (size_t i = 0; i < bytes; ++i) shared.flags[offset + i] |= kAtomic;
  note_write(this_block(), at, static_cast<uint32_t>(bytes), true);
}

// --- asynchronous accesses

void mark_flight(Block& block, uint32_t offset, uint32_t bytes, const char* what) {
  SharedMemory& shared = block.shared;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if ((shared.flags[i] & (kInFlight | kBarrierWord)) != 0 || shared.readers[i] != 0) {
      report_shared(block, i, 1, true, what);
    }
    shared.flags[i] = kInFlight;
  }
  check_order(block, offset, bytes, true, what);
  std::memset(shared.base + offset, 0xff, bytes);
}

void land_bytes(Block& block, uint32_t offset, const char* data, uint32_t bytes, const MBarrier* barrier) {
  std::memcpy(block.shared.base + offset, data, bytes);
  std::fill_n(block.shared.flags.begin() + offset, bytes, static_cast<uint8_t>(kWritten));
  if (barrier == nullptr) return;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    block.shared.history[i] = {static_cast<uint32_t>(barrier->phase) + 1, 0, 0,
                               static_cast<uint16_t>(barrier->component), 0};
  }
}

namespace {

// What a thread wrote by ordinary stores reaches the asynchronous proxy through its fence, and other threads' use of that
// proxy through a barrier after the fence.
void check_fenced(const Block& block, uint32_t offset, const char* what, const char* does) {
  const ByteHistory& byte = block.shared.history[offset];
  const Fiber& writer = *block.fibers[byte.writer % static_cast<size_t>(machine->shape.threads)];
  const auto& fences = writer.proxy_fences;
  const auto fence = std::upper_bound(fences.begin(), fences.end(), byte.stamp,
                                      [](uint32_t stamp, const ProxyFence& f) { return stamp < f.stamp; });
  if (fence == fences.end()) {
    kernel_error("%s %s shared byte %u, which thread %d wrote without a fence_async_shared() since", what, does, offset,
                 writer.thread);
  }
  if (&writer != current && !knows(*current, component_of(writer), fence->count)) {
    kernel_error(
        "%s %s shared byte %u, which thread %d wrote; its fence_async_shared() came only after the barrier "
        "between the two threads",
        what, does, offset, writer.thread);
  }
}

}  // namespace

void check_async_read(Block& block, uint32_t offset, uint32_t bytes, const char* what) {
  const SharedMemory& shared = block.shared;
  check_order(block, offset, bytes, false, what);
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    const uint8_t flags = shared.flags[i];
    if ((flags & (kWritten | kInFlight | kBarrierWord)) != kWritten) report_shared(block, i, 1, false, what);
    if ((flags & kGeneric) != 0) check_fenced(block, i, what, "reads");
  }
}

void check_async_write(Block& block, uint32_t offset, uint32_t bytes, const char* what) {
  check_order(block, offset, bytes, true, what);
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if ((block.shared.flags[i] & kGeneric) != 0) check_fenced(block, i, what, "overwrites");
  }
}

void mark_reading(Block& block, uint32_t offset, uint32_t bytes, const char* what) {
  check_async_read(block, offset, bytes, what);
  for (uint32_t i = offset; i < offset + bytes; ++i) ++block.shared.readers[i];
}

void unmark_reading(Block& block, uint32_t offset, uint32_t bytes) {
  for (uint32_t i = offset; i < offset + bytes; ++i) --block.shared.readers[i];
  note_read(block, offset, bytes);  // by the thread that has waited for it
}

void fence_async_shared() {
  const Unwatched inside;
  std::vector<ProxyFence>& fences = current->proxy_fences;
  constexpr size_t kRemembered = 1024;
  if (fences.size() == kRemembered) fences.erase(fences.begin(), fences.begin() + kRemembered / 2);
  fences.push_back({++this_block().cluster->stamp, current->count});
}

// --- registers: a thread's stack

void registers_written(void* registers, size_t bytes) {
  const size_t at = static_cast<size_t>(static_cast<char*>(registers) - current->stack->base());
  if (at >= kStackBytes) return;
  for (size_t word = at / 8; word <= (at + bytes - 1) / 8; ++word) current->stack->stamps()[word] = current->clock;
}

void check_registers(const Fiber& fiber, const void* pointer, size_t bytes, bool writes) {
  const auto* from = static_cast<const char*>(pointer);
  for (const PendingProduct& pending : fiber.products) {
    if (from + bytes <= pending.registers || from >= pending.registers + pending.bytes) continue;
    kernel_error("%s accumulator register %d of a wgmma that is still under way (no wgmma_wait covers it)",
                 writes ? "writes" : "reads", static_cast<int>((from - pending.registers) / 4));
  }
}

// --- global memory

void register_global(const void* base, size_t bytes, bool writable) {
  const auto low = reinterpret_cast<uintptr_t>(base);
  if (bytes > 0) global_ranges.push_back({low, low + bytes, writable});
}

void forget_global(const void* base) {
  const auto low = reinterpret_cast<uintptr_t>(base);
  const auto at =
      std::find_if(global_ranges.rbegin(), global_ranges.rend(), [&](const Range& r) { return r.low == low; });
  if (at != global_ranges.rend()) global_ranges.erase(std::next(at).base());
}

void forget_all_global() { global_ranges.clear(); }

namespace {

bool holds(const Range& range, uintptr_t low, uintptr_t high, bool writes) {
  return low >= range.low && high <= range.high && (range.writable || !writes);
}

}  // namespace

void check_global_range(const void* pointer, size_t bytes, bool writes, const char* what) {
  if (global_ranges.empty() && !current_settings().strict) return;
  const auto low = reinterpret_cast<uintptr_t>(pointer), high = low + bytes;
  if (last_range < global_ranges.size() && holds(global_ranges[last_range], low, high, writes)) return;
  const Range* near = nullptr;
  for (size_t i = 0; i < global_ranges.size(); ++i) {
    const Range& range = global_ranges[i];
    if (holds(range, low, high, writes)) {
      last_range = i;
      return;
    }
    if (low + kRedZone >= range.low && high <= range.high + kRedZone) near = &range;
  }
  const auto* p = reinterpret_cast<const char*>(low);
  if (machine != nullptr && p >= machine->params && p + bytes <= machine->params + machine->param_bytes) return;
  if (near != nullptr && low >= near->low && high <= near->high) {
    kernel_error("%s writes global memory that the kernel may only read (byte %lld of a tensor of %lld)", what,
                 static_cast<long long>(low - near->low), static_cast<long long>(near->high - near->low));
  }
  if (near != nullptr) {
    kernel_error("%s %s global memory out of bounds: %zu bytes at byte %lld of a tensor of %lld bytes", what,
                 writes ? "writes" : "reads", bytes, static_cast<long long>(low) - static_cast<long long>(near->low),
                 static_cast<long long>(near->high - near->low));
  }
  if (current_settings().strict && !is_program_data(pointer)) {
    kernel_error("%s %s %zu bytes at %p, which is in no tensor of the kernel", what, writes ? "writes" : "reads", bytes,
                 pointer);
  }
}

}  // namespace tilewright::emulator
