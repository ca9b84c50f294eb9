// SPDX-License-Identifier: Apache-2.0
#include "ops/ternary_linear/reference.h"

#include <vector>

namespace tilewright::ternary_linear {

void reference(const format::TernaryView& weight, const int8_t* x, int64_t m, int64_t* acc) {
  std::vector<int8_t> row(static_cast<size_t>(weight.k));
  for (int64_t n = 0; n < weight.n; ++n) {
    format::ternary_read_row(weight, n, row.data());
    for (int64_t t = 0; t < m; ++t) {
      int64_t sum = 0;
      for (int64_t k = 0; k < weight.k; ++k) sum += int64_t{row[static_cast<size_t>(k)]} * x[t * weight.k + k];
      acc[t * weight.n + n] = sum;
    }
  }
}

}  // namespace tilewright::ternary_linear
