// SPDX-License-Identifier: Apache-2.0
// Fibers: a stack each, and a switch between them that saves what the calling convention asks for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tilewright::emulator {

inline constexpr size_t kStackBytes = size_t{256} << 10;

// A stack, below it a page that faults, above it one stamp for each 8 bytes: when the word was last written.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* base() const { return base_; }
  uint32_t* stamps() const { return reinterpret_cast<uint32_t*>(base_ + kStackBytes); }
  void clear_stamps(size_t used_bytes);

 private:
  char* mapping_;
  char* base_;
};

// Where a suspended flow of control goes on.
struct Context {
  void* stack_pointer = nullptr;
};

// Saves the running flow in `from` and goes on with `to`.
void switch_context(Context& from, Context& to);
// A context that, when switched to, calls entry(); entry must not return.
Context new_context(const Stack& stack, void (*entry)());

}  // namespace tilewright::emulator
