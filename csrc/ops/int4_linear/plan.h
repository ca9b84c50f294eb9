// SPDX-License-Identifier: Apache-2.0
// How a problem is cut into independent items, and how each item walks. Pure: no memory is touched, no environment read.
#pragma once

#include <cstdint>
#include <string>

#include "ops/int4_linear/problem.h"

namespace tilewright::int4_linear {

struct Plan {
  int64_t blocks_per_item;  // 32-row blocks of one item
  int64_t items;  // independent pieces of work; any thread may run any of them
  int64_t weight_bytes;  // read once
  int64_t operations;  // multiplications and additions
};

Plan choose_plan(int64_t m, const format::Int4View& weight);
std::string describe(const Plan& plan);

}  // namespace tilewright::int4_linear
