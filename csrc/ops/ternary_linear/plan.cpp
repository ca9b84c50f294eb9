// SPDX-License-Identifier: Apache-2.0
#include "ops/ternary_linear/plan.h"

#include <sstream>

namespace tilewright::ternary_linear {
namespace {

// Rows whose decoded form one step of the plain kernel keeps, whatever the packing.
constexpr int64_t kRowsPerPlainItem = 64;
// A table serves all rows of an item, so an item has as many rows as have accumulators: eight vectors of 32.
constexpr int64_t kRowsPerTableItem = 256;
// Tables take 21 bytes a column and token: four tokens of K = 2560 are 215 KB, which stay in the second-level cache.
constexpr int64_t kTokensWithTables = 4;

}  // namespace

Plan choose_plan(int64_t m, const format::TernaryView& weight) {
  const bool table = weight.packing == format::TernaryPacking::kT3w;
  Plan plan{};
  plan.rows_per_item = table ? kRowsPerTableItem : kRowsPerPlainItem;
  plan.items = m == 0 ? 0 : ceil_div(weight.n, plan.rows_per_item);
  plan.tokens_per_call = table ? kTokensWithTables : m;
  plan.weight_bytes = format::ternary_payload_bytes(weight.packing, weight.n, weight.k);
  plan.operations = 2 * m * weight.n * weight.k;
  return plan;
}

std::string describe(const Plan& plan) {
  std::ostringstream text;
  text << "items=" << plan.items << " rows_per_item=" << plan.rows_per_item << " weight_bytes=" << plan.weight_bytes
       << " operations=" << plan.operations;
  return text.str();
}

}  // namespace tilewright::ternary_linear
