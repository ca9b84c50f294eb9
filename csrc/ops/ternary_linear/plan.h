// SPDX-License-Identifier: Apache-2.0
// How a problem is cut into independent items. Pure: no memory is touched, no environment read.
#pragma once

#include <cstdint>
#include <string>

#include "format/ternary_blob.h"

namespace tilewright::ternary_linear {

struct Plan {
  int64_t rows_per_item;
  int64_t items;            // independent pieces of work; any thread may run any of them
  int64_t tokens_per_call;  // t3w: as many tokens as have tables at a time; the others: all
  int64_t weight_bytes;     // read once by one token
  int64_t operations;       // multiplications and additions
};

Plan choose_plan(int64_t m, const format::TernaryView& weight);
std::string describe(const Plan& plan);

}  // namespace tilewright::ternary_linear
