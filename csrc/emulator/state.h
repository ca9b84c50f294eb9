// SPDX-License-Identifier: Apache-2.0
// The machine while a grid runs: clusters, blocks, warps, threads. Internal to the emulator.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/fiber.h"
#include "emulator/products.h"
#include "emulator/runtime.h"

namespace tilewright::emulator {

inline constexpr int kMaxThreads = 1024;
inline constexpr uint32_t kSharedBase = 1024;              // shared_address() of the first byte of dynamic memory
inline constexpr size_t kMaxSharedBytes = 232448;
inline constexpr size_t kSlotBytes = size_t{512} << 10;    // of address space for one block's shared memory
inline constexpr size_t kSlotMargin = size_t{128} << 10;   // before the first byte
inline constexpr int kSlots = 512;

struct Block;
struct SharedMemory;
void give_shared(SharedMemory& shared);
struct Cluster;
struct Fiber;

// What is known of one byte of shared memory.
enum ByteFlag : uint8_t {
  kWritten = 1,
  kInFlight = 2,   // an asynchronous copy will write it
  kBarrierWord = 4,
  kGeneric = 8,    // last written by an ordinary store
  kAtomic = 16,    // last written by an atomic
};

// Who accessed a byte of shared memory last: a thread of the cluster, or a barrier for the copies that land on it.
struct ByteHistory {
  uint32_t write_count = 0, read_count = 0;  // 0: never
  uint32_t stamp = 0;                        // when an ordinary store wrote it
  uint16_t writer = 0, reader = 0;
};

struct SharedMemory {
  SharedMemory() = default;
  ~SharedMemory() { give_shared(*this); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* base = nullptr;
  int slot = -1;
  uint32_t bytes = 0;
  std::vector<uint8_t> flags;
  std::vector<uint8_t> readers;      // asynchronous reads under way
  std::vector<ByteHistory> history;
};

// A product that this thread takes part in and whose registers it has not got back.
struct PendingProduct {
  Product* product;
  char* registers;
  size_t bytes;
  int group;  // commit group, -1 before the commit
};

struct AsyncCopy {
  uint32_t offset;
  const char* from;
  int bytes, valid;
  int group;
};

// Up to 16 bytes that lie together in shared memory and in global memory; bytes outside [low, high) are out of bounds.
struct Chunk {
  uint32_t offset;
  uint32_t bytes, low, high;
  char* global;
};

// A store by the copy engine: reads shared memory late, writes global memory later.
struct AsyncStore {
  std::vector<Chunk> chunks;
  std::vector<char> data;
  bool read = false;
  int group = -1;
};

// A fence_async_shared(): when, and the thread's count of releases then.
struct ProxyFence {
  uint32_t stamp, count;
};

struct Fiber {
  enum class State : uint8_t { kReady, kRunning, kParked, kPolling, kDone };

  Context context;
  std::unique_ptr<Stack> stack;
  Block* block = nullptr;
  Dim3 index;
  int thread = 0;
  State state = State::kDone;
  const char* doing = "";        // the call in which it is parked
  const void* waits_for = nullptr;
  uint64_t waits_detail = 0;

  // order
  Clock told;                    // what it knows of others
  uint32_t count = 1;            // of its own releases

  // registers (the stack)
  uint32_t clock = 1;
  uint32_t register_fence = 0;   // clock at the last wgmma_fence; 0: none yet
  std::vector<ProxyFence> proxy_fences;

  // wgmma
  uint64_t issued = 0;           // products issued by this thread
  std::vector<PendingProduct> products;
  int product_groups = 0;        // committed
  // cp.async
  std::vector<AsyncCopy> copies;
  int copy_groups = 0;
  // bulk stores
  std::vector<std::unique_ptr<AsyncStore>> stores;
  int store_groups = 0;
  int vote_result = 0;

  int warp() const { return thread / 32; }
  int lane() const { return thread % 32; }
};

// Lanes that wait for each other in one warp instruction.
struct Meeting {
  const char* name;
  uint32_t mask, arrived = 0;
  std::array<void*, 32> data{};
  Gathering released;
};

struct Warp {
  std::vector<std::unique_ptr<Meeting>> meetings;
  uint32_t done = 0;              // lanes that returned
  uint32_t priority = 0;
  std::vector<Fiber*> ready;
};

struct NamedBarrier {
  int needed = 0;
  int arrived = 0;
  int predicate_count = 0;
  std::bitset<kMaxThreads> who;
  std::vector<Fiber*> waiting;
  Gathering released;
};

struct MBarrier {
  uint32_t offset;
  int count = 0, pending = 0;
  int64_t bytes = 0;             // announced less come
  int64_t announced = 0;         // in this phase
  uint64_t phase = 0;
  bool fenced = false;
  std::vector<Fiber*> waiting;
  std::vector<Fiber*> unseen;    // released by the last phase's end, not yet run since
  std::vector<int> who;          // threads that arrived in this phase
  size_t component = 0;          // of clocks
  size_t made_by = 0;            // component of the thread that called init
  uint32_t made_at = 0;          // and its count then
  Gathering released;            // in this phase
  Clock passed_on;               // by the end of the last one
};

struct WarpGroup {
  std::deque<std::unique_ptr<Product>> products;
  uint64_t first = 0;            // serial of products.front()
  int registers = 0;             // setmaxnreg; 0: as launched
  std::vector<Fiber*> waiting;
};

struct Block {
  Cluster* cluster = nullptr;
  int rank = 0;
  int64_t serial = 0;            // in the grid
  Dim3 index;
  SharedMemory shared;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<WarpGroup> groups;
  std::array<NamedBarrier, 16> named;
  std::map<uint32_t, MBarrier> barriers;
  int alive = 0;
};

// A copy into shared memory on its way.
struct Flight {
  Block* block;
  std::function<void()> land;
  std::string what;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Warp*> warps;
  std::vector<Fiber*> polling;
  std::vector<std::unique_ptr<Flight>> flights;
  NamedBarrier sync;
  int alive = 0, ready = 0;
  size_t components = 0;         // of clocks: threads, then barriers
  uint32_t stamp = 1;            // of ordinary stores and fences
  uint64_t progress = 0;         // something else than polling happened
  uint64_t polled = ~uint64_t{0};  // progress when the pollers last had a turn
};

struct Machine {
  GridShape shape;
  Body body = nullptr;
  const void* call = nullptr;
  const char* params = nullptr;
  size_t param_bytes = 0;
  std::mt19937_64 random;
  Context scheduler;
  std::string error;
  std::vector<std::unique_ptr<Cluster>> running;
  std::vector<std::unique_ptr<Fiber>> spare_fibers;
};

extern Machine* machine;                 // of the grid that runs
extern thread_local Fiber* current __attribute__((tls_model("initial-exec")));

// The thread whose loads and stores the hooks look at: none while the emulator itself runs, although templates of the
// standard library may have been linked in their instrumented form.
extern thread_local Fiber* watched __attribute__((tls_model("initial-exec")));
class Unwatched {
 public:
  Unwatched() : before_(watched) { watched = nullptr; }
  ~Unwatched() { watched = before_; }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;

 private:
  Fiber* before_;
};

// scheduler.cpp
void park(const char* doing, const void* waits_for, uint64_t detail = 0);
void wake(Fiber* fiber);
void poll_again();
uint64_t random_below(uint64_t limit);
std::string place(const Fiber& fiber);
[[noreturn]] void abandon(std::string message);
std::string deadlock_report(const Cluster& cluster);
void finish_named(NamedBarrier& barrier, const Fiber* running = nullptr);

// order.cpp
size_t component_of(const Fiber& fiber);
size_t new_component(Cluster& cluster);
bool knows(const Fiber& fiber, size_t component, uint32_t count);
void release(Fiber& fiber, Gathering& to);      // what it did so far is told to whoever takes from there
void acquire(Fiber& fiber, const Clock& clock);
void check_order(Block& block, uint32_t offset, uint32_t bytes, bool writes, const char* what);
void check_readers(Block& block, uint32_t offset, uint32_t bytes, const char* what);
void note_read(Block& block, uint32_t offset, uint32_t bytes);
void note_write(Block& block, uint32_t offset, uint32_t bytes, bool generic);
void thread_ends();

// memory.cpp
void take_shared(SharedMemory& shared, uint32_t bytes);
uint32_t shared_offset(const Block& block, const void* pointer, size_t bytes, const char* what);
void mark_flight(Block& block, uint32_t offset, uint32_t bytes, const char* what);
void land_bytes(Block& block, uint32_t offset, const char* data, uint32_t bytes, const MBarrier* barrier);
void check_async_read(Block& block, uint32_t offset, uint32_t bytes, const char* what);
void check_async_write(Block& block, uint32_t offset, uint32_t bytes, const char* what);
void mark_reading(Block& block, uint32_t offset, uint32_t bytes, const char* what);
void unmark_reading(Block& block, uint32_t offset, uint32_t bytes);
void check_global_range(const void* pointer, size_t bytes, bool writes, const char* what);

// barrier.cpp
MBarrier& barrier_at(Block& block, const void* pointer, const char* what);
void bytes_came(Block& block, uint32_t barrier_offset, int64_t bytes);

// copies.cpp, wgmma.cpp: when a thread returns
void copies_end(Fiber& fiber);
void products_end(Fiber& fiber);

inline Block& this_block() { return *current->block; }

}  // namespace tilewright::emulator
