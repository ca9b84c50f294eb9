// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies: the copy engine's boxes and runs of bytes, and cp.async.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "emulator/state.h"

namespace tilewright::emulator {

// What the driver checks when it encodes a tensor map.
void check_box(const Box& box) {
  const auto refuse = [](const std::string& why) {
    throw std::runtime_error("emulator: a tensor map was refused: " + why);
  };
  if (box.rank < 1 || box.rank > 5) refuse("rank " + std::to_string(box.rank) + ", 1 to 5 are possible");
  if (reinterpret_cast<uintptr_t>(box.base) % 16 != 0) refuse("its base is no multiple of 16 bytes");
  for (int d = 0; d < box.rank; ++d) {
    if (box.sizes[d] == 0 || box.sizes[d] > (uint64_t{1} << 32)) refuse("size " + std::to_string(box.sizes[d]));
    if (box.extent[d] == 0 || box.extent[d] > 256) {
      refuse("box of " + std::to_string(box.extent[d]) + " in dimension " + std::to_string(d) +
             ", 1 to 256 are possible");
    }
    if (d > 0 && (box.strides[d] % 16 != 0 || box.strides[d] >= (uint64_t{1} << 40))) {
      refuse("stride " + std::to_string(box.strides[d]) + " of dimension " + std::to_string(d) +
             ", a multiple of 16 bytes below 2^40 is needed");
    }
  }
  const uint32_t inner = box.extent[0] * box.element_bytes;
  if (inner % 16 != 0) refuse("its box is " + std::to_string(inner) + " bytes wide, a multiple of 16 is needed");
  if (box.swizzle != 0 && inner != box.swizzle) {
    refuse("its box is " + std::to_string(inner) + " bytes wide, the swizzle's " + std::to_string(box.swizzle) +
           " are needed");
  }
}

namespace {

uint32_t swizzle_offset(uint32_t offset, uint32_t swizzle) {
  const uint32_t mask = swizzle == 128 ? 0x70 : swizzle == 64 ? 0x30 : swizzle == 32 ? 0x10 : 0;
  return offset ^ ((offset >> 3) & mask);
}

// The box at the coordinates, in pieces of 16 bytes, as it lies in shared memory from `offset` on.
std::vector<Chunk> chunks_of(const Box& box, uint32_t offset, const int* coordinates) {
  const uint32_t inner = box.extent[0] * box.element_bytes;
  uint32_t rows = 1;
  for (int d = 1; d < box.rank; ++d) rows *= box.extent[d];
  std::vector<Chunk> chunks;
  chunks.reserve(static_cast<size_t>(rows) * inner / 16);
  const int64_t width = static_cast<int64_t>(box.sizes[0]) * box.element_bytes;
  for (uint32_t row = 0; row < rows; ++row) {
    int64_t at = static_cast<int64_t>(coordinates[0]) * box.element_bytes;
    const int64_t start = at;
    bool inside = true;
    uint32_t left = row;
    for (int d = 1; d < box.rank; ++d) {
      const int64_t c = static_cast<int64_t>(coordinates[d]) + left % box.extent[d];
      left /= box.extent[d];
      inside = inside && c >= 0 && c < static_cast<int64_t>(box.sizes[d]);
      at += c * static_cast<int64_t>(box.strides[d]);
    }
    for (uint32_t b = 0; b < inner; b += 16) {
      Chunk chunk{swizzle_offset(offset + row * inner + b, box.swizzle), 16, 0, 0, nullptr};
      if (inside) {
        chunk.low = static_cast<uint32_t>(std::clamp<int64_t>(-(start + b), 0, 16));
        chunk.high = static_cast<uint32_t>(std::clamp<int64_t>(width - (start + b), chunk.low, 16));
        chunk.global = const_cast<char*>(box.base) + at + b;
      }
      chunks.push_back(chunk);
    }
  }
  return chunks;
}

std::vector<Chunk> chunks_of_run(uint32_t offset, char* global, uint32_t bytes) {
  std::vector<Chunk> chunks;
  for (uint32_t b = 0; b < bytes; b += 16) chunks.push_back({offset + b, 16, 0, 16, global + b});
  return chunks;
}

void check_chunks(const std::vector<Chunk>& chunks, bool writes, const char* what) {
  for (const Chunk& chunk : chunks) {
    if (chunk.high > chunk.low) check_global_range(chunk.global + chunk.low, chunk.high - chunk.low, writes, what);
  }
}

void check_place(const void* shared, uint32_t bytes, uint32_t multiple, const char* what) {
  const uint32_t offset = shared_offset(this_block(), shared, bytes, what);
  if (offset % multiple != 0) {
    kernel_error("%s: shared byte %u is no multiple of %u", what, offset, multiple);
  }
}

void start_load(Block& block, std::vector<Chunk> chunks, uint32_t barrier, const char* what) {
  for (const Chunk& chunk : chunks) {
    if ((block.shared.flags[chunk.offset] & kInFlight) == 0) check_async_write(block, chunk.offset, chunk.bytes, what);
    mark_flight(block, chunk.offset, chunk.bytes, what);
  }
  auto flight = std::make_unique<Flight>();
  flight->block = &block;
  flight->what =
      std::string(what) + " to shared byte " + std::to_string(chunks.front().offset) + " issued by " + place(*current);
  flight->land = [&block, barrier, chunks = std::move(chunks)] {
    int64_t bytes = 0;
    MBarrier& counted = block.barriers.at(barrier);
    for (const Chunk& chunk : chunks) {
      char data[16] = {};
      if (chunk.high > chunk.low) std::memcpy(data + chunk.low, chunk.global + chunk.low, chunk.high - chunk.low);
      land_bytes(block, chunk.offset, data, chunk.bytes, &counted);
      bytes += chunk.bytes;
    }
    counted.released.add(counted.component, static_cast<uint32_t>(counted.phase) + 1, block.cluster->components);
    bytes_came(block, barrier, bytes);
  };
  block.cluster->flights.push_back(std::move(flight));
}

// The copy engine, and other blocks, see a barrier only once its init has been fenced and a barrier passed.
void check_barrier(const MBarrier& barrier, const char* what) {
  if (!barrier.fenced) {
    kernel_error("%s on the barrier at shared byte %u, whose init() was not followed by fence_barrier_init()", what,
                 barrier.offset);
  }
  if (!knows(*current, barrier.made_by, barrier.made_at)) {
    kernel_error("%s on the barrier at shared byte %u, but nothing orders its init() before this", what,
                 barrier.offset);
  }
}

void check_rank(const Box& box, int rank) {
  if (box.rank != rank) kernel_error("%d coordinates for a tensor map of rank %d", rank, box.rank);
}

uint32_t box_bytes(const Box& box) {
  uint32_t bytes = box.element_bytes;
  for (int d = 0; d < box.rank; ++d) bytes *= box.extent[d];
  return bytes;
}

}  // namespace

void load_box(void* to, const Box& box, void* barrier, const int* coordinates, int rank, uint32_t blocks) {
  const Unwatched inside;
  constexpr const char* kWhat = "load_tile";
  check_rank(box, rank);
  check_place(to, box_bytes(box), 128, kWhat);
  const uint32_t offset = shared_offset(this_block(), to, box_bytes(box), kWhat);
  const uint32_t at_barrier = shared_offset(this_block(), barrier, 8, kWhat);
  std::vector<Chunk> chunks = chunks_of(box, offset, coordinates);
  check_chunks(chunks, false, kWhat);
  Cluster& cluster = *this_block().cluster;
  const uint32_t mask = (blocks & kMulticast) != 0 ? blocks & 0xffffu : 1u << this_block().rank;
  if ((mask >> cluster.blocks.size()) != 0 || mask == 0) {
    kernel_error("load_tile_multicast to blocks %04x of a cluster of %zu", mask, cluster.blocks.size());
  }
  for (size_t rank_to = 0; rank_to < cluster.blocks.size(); ++rank_to) {
    if (((mask >> rank_to) & 1u) == 0) continue;
    Block& target = *cluster.blocks[rank_to];
    const auto counted = target.barriers.find(at_barrier);
    if (counted == target.barriers.end()) {
      kernel_error("load_tile: block %zu of the cluster has no barrier at shared byte %u", rank_to, at_barrier);
    }
    check_barrier(counted->second, kWhat);
    start_load(target, chunks, at_barrier, kWhat);
  }
}

void load_bulk(void* to, const void* from, uint32_t bytes, void* barrier) {
  const Unwatched inside;
  constexpr const char* kWhat = "load_bulk";
  if (bytes == 0 || bytes % 16 != 0) kernel_error("load_bulk of %u bytes; a multiple of 16 is needed", bytes);
  check_place(to, bytes, 16, kWhat);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) kernel_error("load_bulk from the misaligned address %p", from);
  MBarrier& state = barrier_at(this_block(), barrier, kWhat);
  check_barrier(state, kWhat);
  check_global_range(from, bytes, false, kWhat);
  const uint32_t offset = shared_offset(this_block(), to, bytes, kWhat);
  start_load(this_block(), chunks_of_run(offset, static_cast<char*>(const_cast<void*>(from)), bytes), state.offset,
             kWhat);
}

// --- stores

namespace {

void start_store(std::vector<Chunk> chunks, const char* what) {
  check_chunks(chunks, true, what);
  for (const Chunk& chunk : chunks) mark_reading(this_block(), chunk.offset, chunk.bytes, what);
  auto store = std::make_unique<AsyncStore>();
  store->chunks = std::move(chunks);
  current->stores.push_back(std::move(store));
}

void read_sources(Block& block, AsyncStore& store) {
  if (store.read) return;
  store.read = true;
  store.data.resize(store.chunks.size() * 16);
  for (size_t i = 0; i < store.chunks.size(); ++i) {
    const Chunk& chunk = store.chunks[i];
    std::memcpy(store.data.data() + i * 16, block.shared.base + chunk.offset, chunk.bytes);
    unmark_reading(block, chunk.offset, chunk.bytes);
  }
}

void write_targets(const AsyncStore& store) {
  for (size_t i = 0; i < store.chunks.size(); ++i) {
    const Chunk& chunk = store.chunks[i];
    if (chunk.high == chunk.low) continue;
    std::memcpy(chunk.global + chunk.low, store.data.data() + i * 16 + chunk.low, chunk.high - chunk.low);
  }
}

}  // namespace

void store_box(const Box& box, const void* from, const int* coordinates, int rank) {
  const Unwatched inside;
  constexpr const char* kWhat = "store_tile";
  check_rank(box, rank);
  check_place(from, box_bytes(box), 128, kWhat);
  start_store(chunks_of(box, shared_offset(this_block(), from, box_bytes(box), kWhat), coordinates), kWhat);
}

void store_bulk(void* to, const void* from, uint32_t bytes) {
  const Unwatched inside;
  constexpr const char* kWhat = "store_bulk";
  if (bytes == 0 || bytes % 16 != 0) kernel_error("store_bulk of %u bytes; a multiple of 16 is needed", bytes);
  check_place(from, bytes, 16, kWhat);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) kernel_error("store_bulk to the misaligned address %p", to);
  start_store(chunks_of_run(shared_offset(this_block(), from, bytes, kWhat), static_cast<char*>(to), bytes), kWhat);
}

void store_commit() {
  const Unwatched inside;
  for (auto& store : current->stores) {
    if (store->group < 0) store->group = current->store_groups;
  }
  ++current->store_groups;
}

void store_wait(int pending, bool only_sources) {
  const Unwatched inside;
  Fiber& fiber = *current;
  for (auto& store : fiber.stores) {
    if (store->group < 0 || store->group >= fiber.store_groups - pending) continue;
    read_sources(this_block(), *store);
    if (!only_sources) write_targets(*store);
  }
  if (only_sources) return;
  std::erase_if(fiber.stores,
                [&](const auto& store) { return store->group >= 0 && store->group < fiber.store_groups - pending; });
}

// --- cp.async

void copy_async(void* shared, const void* global, int bytes, int valid_bytes) {
  const Unwatched inside;
  constexpr const char* kWhat = "copy_async";
  if (valid_bytes < 0 || valid_bytes > bytes) kernel_error("copy_async of %d valid bytes of %d", valid_bytes, bytes);
  check_place(shared, static_cast<uint32_t>(bytes), static_cast<uint32_t>(bytes), kWhat);
  if (reinterpret_cast<uintptr_t>(global) % static_cast<uintptr_t>(bytes) != 0) {
    kernel_error("copy_async_%d from the misaligned address %p", bytes, global);
  }
  if (valid_bytes > 0) check_global_range(global, static_cast<size_t>(valid_bytes), false, kWhat);
  const uint32_t offset = shared_offset(this_block(), shared, static_cast<size_t>(bytes), kWhat);
  mark_flight(this_block(), offset, static_cast<uint32_t>(bytes), kWhat);
  current->copies.push_back({offset, static_cast<const char*>(global), bytes, valid_bytes, -1});
}

void copy_async_commit() {
  const Unwatched inside;
  for (AsyncCopy& copy : current->copies) {
    if (copy.group < 0) copy.group = current->copy_groups;
  }
  ++current->copy_groups;
}

// What cp.async writes counts as written by the thread itself, through the ordinary proxy.
void copy_async_wait(int pending) {
  const Unwatched inside;
  Fiber& fiber = *current;
  const auto due = [&](const AsyncCopy& copy) { return copy.group >= 0 && copy.group < fiber.copy_groups - pending; };
  for (const AsyncCopy& copy : fiber.copies) {
    if (!due(copy)) continue;
    char data[16] = {};
    if (copy.valid > 0) std::memcpy(data, copy.from, static_cast<size_t>(copy.valid));
    land_bytes(this_block(), copy.offset, data, static_cast<uint32_t>(copy.bytes), nullptr);
    for (int i = 0; i < copy.bytes; ++i) this_block().shared.flags[copy.offset + static_cast<uint32_t>(i)] |= kGeneric;
    note_write(this_block(), copy.offset, static_cast<uint32_t>(copy.bytes), true);
  }
  std::erase_if(fiber.copies, due);
}

void copies_end(Fiber& fiber) {
  if (!fiber.copies.empty()) {
    kernel_error("returns while a copy_async of it to shared byte %u is on its way", fiber.copies.front().offset);
  }
  for (auto& store : fiber.stores) {
    if (store->group < 0) kernel_error("returns with a bulk store that it never committed (store_commit())");
    if (!store->read) {
      kernel_error("returns while a bulk store still reads shared byte %u; store_wait<0>() first",
                   store->chunks.front().offset);
    }
    write_targets(*store);
  }
  fiber.stores.clear();
}

}  // namespace tilewright::emulator
