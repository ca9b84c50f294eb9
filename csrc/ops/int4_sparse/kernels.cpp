// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_sparse/kernels.h"

namespace tilewright::int4_sparse {

const Kernels& kernels() {
  static constexpr Kernels generic_kernels{generic::rows, generic::columns};
#if defined(__x86_64__)
  static constexpr Kernels avx2_kernels{avx2::rows, avx2::columns}, avx512_kernels{avx512::rows, avx512::columns};
  static constexpr isa::Table<const Kernels*> table{
      {&generic_kernels, &avx2_kernels, &avx512_kernels, &avx512_kernels}};
  return *table.pick();
#else
  return generic_kernels;
#endif
}

void list_inputs(const format::Int4ColumnsView& w, const int8_t* codes, int32_t* inputs, int32_t* starts) {
  int32_t count = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    starts[g] = count;
    const int64_t last = std::min(w.k, (g + 1) * w.group);
    for (int64_t k = g * w.group; k < last; ++k) {
      inputs[count] = static_cast<int32_t>(k);
      count += codes[k] != 0;
    }
  }
  starts[w.groups] = count;
}

}  // namespace tilewright::int4_sparse
