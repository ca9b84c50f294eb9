// SPDX-License-Identifier: Apache-2.0
#include "ops/sparse_gated_mlp/plan.h"

#include <algorithm>
#include <sstream>

#include "core/memory.h"
#include "ops/sparse_gated_mlp/problem.h"

namespace tilewright::sparse_gated_mlp {
namespace {

constexpr int64_t kVector = 16;                       // neurons whose activation is computed together
constexpr int64_t kItemBytes = int64_t{1} << 17;      // a run that hardware prefetchers follow
constexpr int64_t kWorkspaceFloats = int64_t{1} << 16;  // of the partial sums of an item: they stay in the second cache
constexpr int64_t kItemsPerThread = 2;  // so that a thread that is held up holds up no other

// Rows of an item: enough bytes for a stream, few enough that each thread gets several.
int64_t rows_per_item(int64_t rows, int64_t row_bytes, int64_t threads, int64_t multiple) {
  const int64_t by_bytes = ceil_div(kItemBytes, std::max<int64_t>(row_bytes, 1));
  const int64_t by_threads = ceil_div(rows, kItemsPerThread * threads);
  return std::max(round_up(std::min(by_bytes, by_threads), multiple), multiple);
}

}  // namespace

Plan choose_plan(const Shape& s, int64_t active, int64_t threads) {
  Plan plan{};
  threads = std::max<int64_t>(threads, 1);
  plan.dense = static_cast<double>(active) > kDenseShare * static_cast<double>(s.inner);
  plan.rows = plan.dense ? s.inner : active;
  const int64_t row_bytes = s.hidden * s.element_bytes;
  plan.gate_rows = rows_per_item(s.inner, row_bytes, threads, kVector);
  plan.gate_items = ceil_div(s.inner, plan.gate_rows);
  plan.up_rows = rows_per_item(plan.rows, row_bytes, threads, 1);
  plan.up_items = ceil_div(plan.rows, plan.up_rows);
  const int64_t line = kCacheLine / s.element_bytes;
  const int64_t tokens = std::clamp<int64_t>(s.tokens, 1, kTokenTile);
  // One item a thread reads the longest runs; a workspace beyond the second cache would cost more than that saves.
  const int64_t fits = kWorkspaceFloats / (kVector * 2 * tokens);
  plan.columns = std::max(round_up(std::min(ceil_div(s.hidden, threads), fits), line), line);
  plan.down_items = ceil_div(s.hidden, plan.columns);
  if (s.tokens == 0) plan.gate_items = plan.up_items = plan.down_items = plan.rows = 0;
  plan.bytes = s.tokens == 0 ? 0 : (s.inner + 2 * plan.rows) * row_bytes;
  plan.operations = 2 * s.tokens * s.hidden * (s.inner + 2 * plan.rows);
  return plan;
}

int64_t list_rows(const uint8_t* needed, int64_t inner, int32_t* rows, int32_t* by_class, int32_t* class_starts) {
  int64_t count = 0;
  std::fill_n(class_starts, kClasses + 1, 0);
  for (int64_t j = 0; j < inner; ++j) {
    rows[count] = static_cast<int32_t>(j);  // one place more than there are rows: written before it is known
    count += needed[j] != 0;
    class_starts[j % kClasses + 1] += needed[j] != 0;
  }
  for (int64_t g = 0; g < kClasses; ++g) class_starts[g + 1] += class_starts[g];
  int32_t next[kClasses];
  std::copy_n(class_starts, kClasses, next);
  for (int64_t i = 0; i < count; ++i) by_class[next[rows[i] % kClasses]++] = static_cast<int32_t>(i);
  return count;
}

std::string describe(const Plan& plan) {
  std::ostringstream text;
  text << (plan.dense ? "dense" : "sparse") << " rows=" << plan.rows << " gate_items=" << plan.gate_items << "x"
       << plan.gate_rows << " up_items=" << plan.up_items << "x" << plan.up_rows << " down_items=" << plan.down_items
       << "x" << plan.columns << " bytes=" << plan.bytes << " operations=" << plan.operations;
  return text.str();
}

}  // namespace tilewright::sparse_gated_mlp
