// SPDX-License-Identifier: Apache-2.0
#include "ops/local_linear_attention/kernels.h"

namespace tilewright::local_linear_attention {

template <>
const Kernels<float>& kernels<float>() {
#if defined(__x86_64__)
  static constexpr isa::Table<const Kernels<float>*> table{
      {&generic::kFloat, &avx2::kFloat, &avx512::kFloat, &avx512::kFloat}};
  return *table.pick();
#else
  return generic::kFloat;
#endif
}

template <>
const Kernels<double>& kernels<double>() {
#if defined(__x86_64__)
  static constexpr isa::Table<const Kernels<double>*> table{
      {&generic::kDouble, &avx2::kDouble, &avx512::kDouble, &avx512::kDouble}};
  return *table.pick();
#else
  return generic::kDouble;
#endif
}

}  // namespace tilewright::local_linear_attention
