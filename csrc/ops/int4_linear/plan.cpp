// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_linear/plan.h"

#include <sstream>

namespace tilewright::int4_linear {
Plan choose_plan(int64_t m, const format::Int4View& weight) {
  Plan plan{};
  plan.blocks_per_item = 1;
  plan.items = m == 0 ? 0 : ceil_div(weight.blocks, plan.blocks_per_item);
  plan.weight_bytes = weight.blocks * weight.block_bytes;
  plan.operations = 2 * m * weight.n * weight.k;
  return plan;
}

std::string describe(const Plan& plan) {
  std::ostringstream text;
  text << "items=" << plan.items << " rows_per_item=" << plan.blocks_per_item * format::Int4::kRowsPerBlock
       << " weight_bytes=" << plan.weight_bytes << " operations=" << plan.operations;
  return text.str();
}

}  // namespace tilewright::int4_linear
