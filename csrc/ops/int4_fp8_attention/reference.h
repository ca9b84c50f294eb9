// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/int4_fp8_attention/problem.h"

namespace tilewright::int4_fp8_attention {

// The C++ oracle: everything in double over the dequantized cache; out is [T, H, D], dense.
void reference(const Problem& problem, double* out);

}  // namespace tilewright::int4_fp8_attention
