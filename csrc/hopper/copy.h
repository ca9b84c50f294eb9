// SPDX-License-Identifier: Apache-2.0
// Copies by threads: asynchronous from global to shared memory, and 16 bytes at a time.
#pragma once

#include "hopper/shared.h"

namespace tilewright::hopper {

#if defined(__CUDACC__)

// valid_bytes of the source are read, the rest of the destination becomes zero.
TILEWRIGHT_DEVICE void copy_async_16(void* shared, const void* global, int valid_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid_bytes)
               : "memory");
}
TILEWRIGHT_DEVICE void copy_async_8(void* shared, const void* global, int valid_bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid_bytes)
               : "memory");
}
TILEWRIGHT_DEVICE void copy_async_4(void* shared, const void* global, int valid_bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid_bytes)
               : "memory");
}
TILEWRIGHT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most Pending of this thread's groups are under way.
template <int Pending>
TILEWRIGHT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

TILEWRIGHT_DEVICE U128 load_16(const void* global) { return *static_cast<const U128*>(global); }
TILEWRIGHT_DEVICE void store_16(void* to, U128 value) { *static_cast<U128*>(to) = value; }

// For data that is read once: past the first-level cache.
TILEWRIGHT_DEVICE U128 load_16_streaming(const void* global) {
  U128 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global));
  return value;
}

#else
#include "emulator/copy.h"
#endif

}  // namespace tilewright::hopper
