// SPDX-License-Identifier: Apache-2.0
#include "ops/linear_attention/kernels.h"

namespace tilewright::linear_attention {

template <class T>
const Kernels<T>& kernels(isa::Level level) {
#if defined(__x86_64__)
  static const Kernels<T> table[isa::kLevels] = {generic::table<T>(), avx2::table<T>(), avx512::table<T>(),
                                                 avx512::table<T>()};
  return table[static_cast<int>(level)];
#else
  static const Kernels<T> only = generic::table<T>();
  return (void)level, only;
#endif
}

template const Kernels<float>& kernels(isa::Level);
template const Kernels<double>& kernels(isa::Level);

}  // namespace tilewright::linear_attention
