// SPDX-License-Identifier: Apache-2.0
#include "emulator/fiber.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#if !defined(__x86_64__) || defined(TILEWRIGHT_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace tilewright::emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStampBytes = kStackBytes / 8 * sizeof(uint32_t);
constexpr size_t kMappingBytes = kPage + kStackBytes + kStampBytes;

}  // namespace

Stack::Stack() {
  void* mapping =
      mmap(nullptr, kMappingBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stacks of a kernel's threads");
  mapping_ = static_cast<char*>(mapping);
  base_ = mapping_ + kPage;
  mprotect(mapping_, kPage, PROT_NONE);
}

Stack::~Stack() { munmap(mapping_, kMappingBytes); }

// Stacks grow downwards: only the upper used_bytes of the stack have stamps.
void Stack::clear_stamps(size_t used_bytes) {
  const size_t words = std::min(used_bytes, kStackBytes) / 8;
  std::memset(stamps() + (kStackBytes / 8 - words), 0, words * sizeof(uint32_t));
}

#if defined(__x86_64__) && !defined(TILEWRIGHT_EMULATOR_UCONTEXT)

// rdi: where to save the stack pointer; rsi: the one to go on with.
extern "C" void tilewright_switch_stack(void** from, void* to);
asm(R"(
.text
.hidden tilewright_switch_stack
.globl tilewright_switch_stack
.type tilewright_switch_stack, @function
tilewright_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tilewright_switch_stack, .-tilewright_switch_stack
)");

void switch_context(Context& from, Context& to) { tilewright_switch_stack(&from.stack_pointer, to.stack_pointer); }

Context new_context(const Stack& stack, void (*entry)()) {
  // Six registers, the address to return to, and a zero where entry's own return address would be.
  auto** top = reinterpret_cast<void**>(stack.base() + kStackBytes - 64);
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  return {top};
}

#else

// Elsewhere the C library switches. A fiber's context lies on its stack; the scheduler, of which there is one at a time,
// has none before it first switches.
void switch_context(Context& from, Context& to) {
  static ucontext_t scheduler;
  if (from.stack_pointer == nullptr) from.stack_pointer = &scheduler;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer), static_cast<ucontext_t*>(to.stack_pointer));
}

Context new_context(const Stack& stack, void (*entry)()) {
  auto* context = reinterpret_cast<ucontext_t*>(stack.base() + kStackBytes - sizeof(ucontext_t) - 64);
  getcontext(context);
  context->uc_stack.ss_sp = stack.base();
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t) - 128;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return {context};
}

#endif

}  // namespace tilewright::emulator
