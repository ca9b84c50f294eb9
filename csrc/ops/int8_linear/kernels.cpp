// SPDX-License-Identifier: Apache-2.0
#include "ops/int8_linear/kernels.h"

namespace tilewright::int8_linear {

const Kernels& kernels(isa::Level level) {
  static const Kernels table[isa::kLevels] = {
      {generic::blocks, generic::prepare},
#if defined(__x86_64__)
      {avx2::blocks, avx2::prepare},
      {avx512::blocks, avx512::prepare},
      {avx512::blocks, avx512::prepare},
#endif
  };
  return table[static_cast<int>(level)];
}

}  // namespace tilewright::int8_linear
