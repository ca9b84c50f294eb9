// SPDX-License-Identifier: Apache-2.0
// The emulator from outside: its settings, and the global memory that kernels may touch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tilewright::emulator {

struct Settings {
  uint64_t seed = 0;        // of the order in which threads run
  int multiprocessors = 4;  // what a persistent kernel is told
  bool strict = false;      // global memory outside every registered range is an error
  uint64_t launches = 0;    // since the process began
};
Settings& current_settings();

// Memory that kernels may read, or also write. Ranges may overlap; forgetting one takes away what starts there.
void register_global(const void* base, size_t bytes, bool writable);
void forget_global(const void* base);
void forget_all_global();

// For the life of the object.
class GlobalRange {
 public:
  GlobalRange(const void* base, size_t bytes, bool writable = true) : base_(base) {
    register_global(base, bytes, writable);
  }
  ~GlobalRange() { forget_global(base_); }
  GlobalRange(const GlobalRange&) = delete;
  GlobalRange& operator=(const GlobalRange&) = delete;

 private:
  const void* base_;
};

}  // namespace tilewright::emulator
