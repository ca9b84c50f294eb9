// SPDX-License-Identifier: Apache-2.0
#include "ops/sparse_gated_mlp/kernels.h"

#include <algorithm>

#include "core/memory.h"
#include "ops/sparse_gated_mlp/plan.h"

namespace tilewright::sparse_gated_mlp {
namespace {

template <class Function>
Function pick([[maybe_unused]] Function avx512, [[maybe_unused]] Function avx2, Function generic) {
#if defined(__x86_64__)
  return isa::Table<Function>{{generic, avx2, avx512, avx512}}.pick();
#else
  return generic;
#endif
}

}  // namespace

#if defined(__x86_64__)
template <>
const Kernels<float>& kernels<float>() {
  return *pick(&avx512::float_kernels, &avx2::float_kernels, &generic::float_kernels);
}
template <>
const Kernels<uint16_t>& kernels<uint16_t>() {
  return *pick(&avx512::bfloat16_kernels, &avx2::bfloat16_kernels, &generic::bfloat16_kernels);
}
Activate activate() { return pick(&avx512::activate, &avx2::activate, &generic::activate); }
#else
template <>
const Kernels<float>& kernels<float>() {
  return generic::float_kernels;
}
template <>
const Kernels<uint16_t>& kernels<uint16_t>() {
  return generic::bfloat16_kernels;
}
Activate activate() { return &generic::activate; }
#endif

int64_t workspace_floats(int64_t tokens, int64_t columns) {
  return kClasses * std::min(tokens, kTokenTile) * round_up(columns, 16);
}

}  // namespace tilewright::sparse_gated_mlp
