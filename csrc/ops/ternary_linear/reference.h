// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/ternary_linear/problem.h"

namespace tilewright::ternary_linear {

// The C++ oracle: one element at a time, in 64 bits. x is [M, K] without padding.
void reference(const format::TernaryView& weight, const int8_t* x, int64_t m, int64_t* acc);

}  // namespace tilewright::ternary_linear
