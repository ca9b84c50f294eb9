// SPDX-License-Identifier: Apache-2.0
#include "ops/linear_attention/kernels.h"

#include "core/memory.h"

namespace tilewright::linear_attention {

void* thread_memory(int64_t bytes) {
  thread_local Scratch memory;
  return memory.get<uint8_t>(bytes);
}

template <>
const Kernels<float>& kernels(isa::Level level) {
#if defined(__x86_64__)
  static constexpr isa::Table<const Kernels<float>*> table{
      {&generic::kFloat, &avx2::kFloat, &avx512::kFloat, &avx512::kFloat}};
  return *table.entries[static_cast<int>(level)];
#else
  return (void)level, generic::kFloat;
#endif
}

template <>
const Kernels<double>& kernels(isa::Level level) {
#if defined(__x86_64__)
  static constexpr isa::Table<const Kernels<double>*> table{
      {&generic::kDouble, &avx2::kDouble, &avx512::kDouble, &avx512::kDouble}};
  return *table.entries[static_cast<int>(level)];
#else
  return (void)level, generic::kDouble;
#endif
}

}  // namespace tilewright::linear_attention
