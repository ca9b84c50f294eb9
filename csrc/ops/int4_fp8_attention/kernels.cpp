// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_fp8_attention/kernels.h"

namespace tilewright::int4_fp8_attention {

const Kernels& kernels(isa::Level level) {
  static const Kernels only{generic::items, generic::append};
  static const Kernels table[isa::kLevels] = {only, only, only, only};
  return table[static_cast<int>(level)];
}

}  // namespace tilewright::int4_fp8_attention
