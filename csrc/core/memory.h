// SPDX-License-Identifier: Apache-2.0
// Integer rounding and 64-byte aligned scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace tilewright {

inline constexpr int64_t kCacheLine = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Grows, never shrinks: one per thread serves every call without allocating again.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const auto bytes = static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), kCacheLine));
    if (bytes > capacity_) {
      data_.reset();
      capacity_ = 0;
      void* fresh = std::aligned_alloc(kCacheLine, bytes);
      if (fresh == nullptr) throw std::bad_alloc();
      data_.reset(fresh);
      capacity_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<void, Free> data_;
  size_t capacity_ = 0;
};

}  // namespace tilewright
