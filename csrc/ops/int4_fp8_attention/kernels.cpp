// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_fp8_attention/kernels.h"

namespace tilewright::int4_fp8_attention {

const Kernels& kernels(isa::Level level) {
#if defined(__x86_64__)
  static const Kernels table[isa::kLevels] = {
      {generic::items, generic::append},
      {avx2::items, avx2::append},
      {avx512::items, avx512::append},
      {avx512_bf16::items, avx512::append},
  };
#else
  static const Kernels only{generic::items, generic::append};
  static const Kernels table[isa::kLevels] = {only, only, only, only};
#endif
  return table[static_cast<int>(level)];
}

}  // namespace tilewright::int4_fp8_attention
