// SPDX-License-Identifier: Apache-2.0
#include "isa/probe.h"

#if defined(__x86_64__)

#include <cpuid.h>

#include <cstdint>

namespace tilewright::isa {
namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

constexpr bool bit(uint32_t word, int index) { return ((word >> index) & 1u) != 0; }

// XCR0 says which register files the operating system saves on a context switch.
uint64_t saved_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr uint64_t kYmmState = 0x6;    // SSE and AVX
constexpr uint64_t kZmmState = 0xe6;   // and opmask, upper halves, upper sixteen

}  // namespace

int probe_cpu() {
  const Registers one = cpuid(1, 0);
  const bool osxsave = bit(one.ecx, 27), avx = bit(one.ecx, 28), fma = bit(one.ecx, 12), f16c = bit(one.ecx, 29);
  if (!osxsave || !avx) return 0;
  const uint64_t state = saved_state();
  const Registers seven = cpuid(7, 0);
  const bool avx2 = bit(seven.ebx, 5);
  if (!avx2 || !fma || !f16c || (state & kYmmState) != kYmmState) return 0;
  const bool foundation = bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31);
  const bool vnni = bit(seven.ecx, 11);
  if (!foundation || !vnni || (state & kZmmState) != kZmmState) return 1;
  const bool bf16 = bit(cpuid(7, 1).eax, 5);
  return bf16 ? 3 : 2;
}

}  // namespace tilewright::isa

#else

namespace tilewright::isa {
int probe_cpu() { return 0; }
}  // namespace tilewright::isa

#endif
