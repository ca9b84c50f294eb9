// SPDX-License-Identifier: Apache-2.0
#include "ops/ternary_linear/kernels.h"

namespace tilewright::ternary_linear {

const Kernels& kernels(isa::Level level) {
  static const Kernels plain{generic::q2_items, nullptr, generic::row_items, generic::quantize,
                             generic::sum,      nullptr, generic::finish};
#if defined(__x86_64__)
  static const Kernels half{avx2::q2_items, nullptr, generic::row_items, avx2::quantize,
                            avx2::sum,      nullptr, avx2::finish};
  static const Kernels whole{avx512::q2_items, avx512::t3w_items,    generic::row_items, avx512::quantize,
                             avx512::sum,      avx512::build_tables, avx512::finish};
#else
  static const Kernels &half = plain, &whole = plain;
#endif
  switch (level) {
    case isa::Level::kGeneric: return plain;
    case isa::Level::kAvx2: return half;
    default: return whole;
  }
}

}  // namespace tilewright::ternary_linear
