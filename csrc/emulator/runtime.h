// SPDX-License-Identifier: Apache-2.0
// What the host halves of the wrappers call. Every function acts for the thread (fiber) that runs; none of them is a
// template, so that kernel sources stay quick to compile and the emulator itself is compiled without instrumentation.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tilewright::emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// --- launch.cpp, scheduler.cpp
struct GridShape {
  int64_t blocks_x = 1;
  int blocks_y = 1, blocks_z = 1;
  int threads = 0;
  int cluster = 1;
  int shared_bytes = 0;
};
using Body = void (*)(const void* call);
// Runs the grid to its end; throws std::runtime_error with kernel, block, thread and reason.
void run_grid(const GridShape& shape, Body body, const void* call, const void* kernel, const char* signature,
              const void* params, size_t param_bytes);
int multiprocessors();

void block_sync();                       // __syncthreads
int block_sync_count(bool predicate);    // __syncthreads_count: _or and _and follow from it
void named_sync(int id, int threads);
void named_arrive(int id, int threads);
void cluster_sync();
int cluster_rank();
void pause_thread();                     // lets everybody else run first: a spinning thread's turn ends
int alive_threads();                     // of the block

// --- warp.cpp: lanes meet; `lanes` holds what each lane passed (null where the lane is not in the mask).
using Finish = void (*)(void* const* lanes, uint32_t mask);
void meet_warp(const char* name, uint32_t mask, void* lane_data, Finish finish);
void sync_warp(uint32_t mask);
uint32_t active_lanes();                 // lanes of the warp that have not returned
void set_registers(int count, bool raise);

// --- barrier.cpp
void barrier_init(void* barrier, int arrivals);
void barrier_arrive(void* barrier, uint32_t expected_bytes, bool expects);
void barrier_arrive_cluster(void* barrier, int block);
bool barrier_test(void* barrier, uint32_t parity);  // false: the thread has lost its turn, to be called in a loop
void barrier_wait(void* barrier, uint32_t parity);
void fence_barrier_init();
void fence_async_shared();

// --- memory.cpp
char* shared_memory();
uint32_t shared_address(const void* pointer);
void registers_written(void* registers, size_t bytes);  // by an instruction, which no hook sees
// A read or write that the kernel makes through a wrapper, checked like one that the compiler instruments.
void check_read(const void* pointer, size_t bytes, const char* what);
void check_write(void* pointer, size_t bytes, const char* what);
void check_alignment(const void* pointer, size_t bytes, const char* what);
void read_cluster(void* to, const void* shared, size_t bytes, int block);  // the same place of another block
void check_global(const void* pointer, const char* what);  // 16 bytes, global only

void check_atomic(void* pointer, size_t bytes);

// --- copies.cpp
struct Box {
  const char* base;
  int rank;
  uint32_t element_bytes;
  uint32_t swizzle;         // bytes of the pattern, 0 for none
  uint64_t sizes[5];
  uint64_t strides[5];      // bytes; strides[0] is element_bytes
  uint32_t extent[5];
};
inline constexpr uint32_t kMulticast = 1u << 16;  // or-ed to the mask of the blocks
void check_box(const Box& box);
void load_box(void* to, const Box& box, void* barrier, const int* coordinates, int rank, uint32_t blocks);
void store_box(const Box& box, const void* from, const int* coordinates, int rank);
void load_bulk(void* to, const void* from, uint32_t bytes, void* barrier);
void store_bulk(void* to, const void* from, uint32_t bytes);
void store_commit();
void store_wait(int pending, bool only_sources);
void copy_async(void* shared, const void* global, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int pending);

// --- wgmma.cpp, mma.cpp
enum class Element : int { kBf16, kF16, kE4m3, kTf32, kS8, kU8 };
struct ProductShape {
  Element a, b;
  int n;
  bool a_mn_major, b_mn_major;
};
void wgmma_issue(const ProductShape& shape, void* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
                 bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void mma(Element a, Element b, void* d, const uint32_t* a_registers, const uint32_t* b_registers);
void load_matrices(uint32_t* registers, const void* row, int count, bool transposed);
void store_matrices(void* row, const uint32_t* registers, int count, bool transposed);

// Ends the kernel with an error; does not return.
[[noreturn]] void kernel_error(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace tilewright::emulator
