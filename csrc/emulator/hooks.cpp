// SPDX-License-Identifier: Apache-2.0
// Kernel sources are compiled with the instrumentation of the thread sanitizer, but without its library: each of their
// loads and stores comes here. Outside a kernel the hooks do nothing.
#include <dlfcn.h>
#include <link.h>

#include "emulator/memory.h"

namespace tilewright::emulator {
namespace {

// The loaded image that holds the emulator and the kernels.
struct Image {
  uintptr_t base = 0, low = ~uintptr_t{0}, high = 0;
};

int find_image(dl_phdr_info* info, size_t, void* data) {
  auto& image = *static_cast<Image*>(data);
  const auto probe = reinterpret_cast<uintptr_t>(&find_image);
  Image candidate;
  candidate.base = info->dlpi_addr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    candidate.low = std::min<uintptr_t>(candidate.low, info->dlpi_addr + header.p_vaddr);
    candidate.high = std::max<uintptr_t>(candidate.high, info->dlpi_addr + header.p_vaddr + header.p_memsz);
  }
  if (probe < candidate.low || probe >= candidate.high) return 0;
  image = candidate;
  return 1;
}

const Image& this_image() {
  static const Image image = [] {
    Image found;
    dl_iterate_phdr(&find_image, &found);
    return found;
  }();
  return image;
}

[[gnu::noinline]] void elsewhere(const void* pointer, size_t bytes, bool writes, const void* caller) {
  instruction = caller;
  check_access(pointer, bytes, writes, writes ? "a store" : "a load");
  instruction = nullptr;
}

[[gnu::noinline]] void misaligned(const void* pointer, size_t bytes, bool writes, const void* caller) {
  instruction = caller;
  kernel_error("a %s of %zu bytes at the misaligned address %p", writes ? "store" : "load", bytes, pointer);
}

inline void access(const void* pointer, size_t bytes, bool writes, bool aligned, const void* caller) {
  Fiber* fiber = watched;
  if (fiber == nullptr) return;
  const size_t in_stack = static_cast<size_t>(static_cast<const char*>(pointer) - fiber->stack->base());
  if (in_stack < kStackBytes) {
    if (!fiber->products.empty()) check_registers(*fiber, pointer, bytes, writes);
    if (writes) {
      uint32_t* stamps = fiber->stack->stamps();
      for (size_t word = in_stack / 8; word <= (in_stack + bytes - 1) / 8; ++word) stamps[word] = fiber->clock;
    }
    return;
  }
  if (aligned && (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) != 0) misaligned(pointer, bytes, writes, caller);
  elsewhere(pointer, bytes, writes, caller);
}

}  // namespace

const void* instruction = nullptr;

size_t image_offset(const void* address) {
  return static_cast<size_t>(reinterpret_cast<uintptr_t>(address) - this_image().base);
}

bool is_program_data(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return address >= this_image().low && address < this_image().high;
}

}  // namespace tilewright::emulator

#define TILEWRIGHT_HOOK extern "C" __attribute__((visibility("hidden")))
#define TILEWRIGHT_ACCESS_HOOKS(Bytes)                                                \
  TILEWRIGHT_HOOK void __tsan_read##Bytes(void* p) {                                  \
    tilewright::emulator::access(p, Bytes, false, true, __builtin_return_address(0)); \
  }                                                                                   \
  TILEWRIGHT_HOOK void __tsan_write##Bytes(void* p) {                                 \
    tilewright::emulator::access(p, Bytes, true, true, __builtin_return_address(0));  \
  }                                                                                   \
  TILEWRIGHT_HOOK void __tsan_volatile_read##Bytes(void* p) {                         \
    tilewright::emulator::volatile_read(p);                                           \
    tilewright::emulator::access(p, Bytes, false, true, __builtin_return_address(0)); \
  }                                                                                   \
  TILEWRIGHT_HOOK void __tsan_volatile_write##Bytes(void* p) {                        \
    tilewright::emulator::access(p, Bytes, true, true, __builtin_return_address(0));  \
  }
#define TILEWRIGHT_UNALIGNED_HOOKS(Bytes)                                              \
  TILEWRIGHT_HOOK void __tsan_unaligned_read##Bytes(void* p) {                         \
    tilewright::emulator::access(p, Bytes, false, false, __builtin_return_address(0)); \
  }                                                                                    \
  TILEWRIGHT_HOOK void __tsan_unaligned_write##Bytes(void* p) {                        \
    tilewright::emulator::access(p, Bytes, true, false, __builtin_return_address(0));  \
  }

namespace tilewright::emulator {
namespace {

// Such reads are how a thread waits for another without an atomic: each gives the others a turn.
inline void volatile_read(const void* pointer) {
  if (watched == nullptr) return;
  const size_t in_stack = static_cast<size_t>(static_cast<const char*>(pointer) - watched->stack->base());
  if (in_stack >= kStackBytes) pause_thread();
}

}  // namespace
}  // namespace tilewright::emulator

TILEWRIGHT_ACCESS_HOOKS(1)
TILEWRIGHT_ACCESS_HOOKS(2)
TILEWRIGHT_ACCESS_HOOKS(4)
TILEWRIGHT_ACCESS_HOOKS(8)
TILEWRIGHT_ACCESS_HOOKS(16)
TILEWRIGHT_UNALIGNED_HOOKS(2)
TILEWRIGHT_UNALIGNED_HOOKS(4)
TILEWRIGHT_UNALIGNED_HOOKS(8)
TILEWRIGHT_UNALIGNED_HOOKS(16)

TILEWRIGHT_HOOK void __tsan_read_range(void* p, long bytes) {
  if (bytes > 0) {
    tilewright::emulator::access(p, static_cast<size_t>(bytes), false, false, __builtin_return_address(0));
  }
}
TILEWRIGHT_HOOK void __tsan_write_range(void* p, long bytes) {
  if (bytes > 0) tilewright::emulator::access(p, static_cast<size_t>(bytes), true, false, __builtin_return_address(0));
}
TILEWRIGHT_HOOK void __tsan_init() {}
TILEWRIGHT_HOOK void __tsan_func_entry(void*) {}
TILEWRIGHT_HOOK void __tsan_func_exit(void*) {}
TILEWRIGHT_HOOK void __tsan_vptr_update(void**, void*) {}
TILEWRIGHT_HOOK void __tsan_vptr_read(void**) {}

// -fsanitize=alignment: the compiler takes vectors apart, so that their alignment shows only where a pointer is used.
namespace tilewright::emulator {
namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct TypeMismatch {
  SourceLocation at;
  const TypeDescriptor* type;
  unsigned char log_alignment, check;
};

}  // namespace
}  // namespace tilewright::emulator

TILEWRIGHT_HOOK void __ubsan_handle_type_mismatch_v1(tilewright::emulator::TypeMismatch* data, void* pointer) {
  using namespace tilewright::emulator;
  if (watched == nullptr) return;
  kernel_error("a %s at the misaligned address %p, a multiple of %u is needed (%s:%u)", data->type->name, pointer,
               1u << data->log_alignment, data->at.file, data->at.line);
}
