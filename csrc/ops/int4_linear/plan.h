// SPDX-License-Identifier: Apache-2.0
// How a problem is cut into independent items, and how each item walks. Pure: no memory is touched, no environment read.
#pragma once

#include <cstdint>
#include <string>

#include "ops/int4_linear/problem.h"

namespace tilewright::int4_linear {

enum class Walk : uint8_t {
  kStream,   // decode the codes where they are used: each weight byte is read once per tile of tokens
  kPanel,    // decode a strip of rows once into a panel, then reuse it over all tokens
};

struct Plan {
  Walk walk;
  int64_t blocks_per_item;   // 16-row blocks of one item
  int64_t items;             // independent pieces of work; any thread may run any of them
  int64_t weight_bytes;      // read once
  int64_t operations;        // multiplications and additions
};

Plan choose_plan(int64_t m, const format::Int4View& weight);
std::string describe(const Plan& plan);

}  // namespace tilewright::int4_linear
