// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_linear/kernels.h"

namespace tilewright::int4_linear {

const Kernels& kernels(isa::Level level) {
#if defined(__x86_64__)
  static const Kernels table[isa::kLevels] = {
      {generic::int8_items, generic::fp8_items, generic::prepare_int8, generic::prepare_fp8},
      {avx2::int8_items, avx2::fp8_items, avx2::prepare_int8, avx2::prepare_fp8},
      {avx512::int8_items, avx512::fp8_items, avx512::prepare_int8, avx512::prepare_fp8},
      {avx512::int8_items, avx512_bf16::fp8_items, avx512::prepare_int8, avx512::prepare_fp8},
  };
#else
  static const Kernels only{generic::int8_items, generic::fp8_items, generic::prepare_int8, generic::prepare_fp8};
  static const Kernels table[isa::kLevels] = {only, only, only, only};
#endif
  return table[static_cast<int>(level)];
}

}  // namespace tilewright::int4_linear
