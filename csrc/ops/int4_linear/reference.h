// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/int4_linear/problem.h"

namespace tilewright::int4_linear {

// The C++ oracle: one element at a time, integers in 64 bits, everything else in double.
void reference(const Problem& problem, double* y);

}  // namespace tilewright::int4_linear
