// SPDX-License-Identifier: Apache-2.0
// Which packing is fastest here: measured once for a class of shapes, remembered for the life of the process.
#pragma once

#include <cstdint>

#include "format/ternary.h"

namespace tilewright::ternary_linear {

// q2 or t3w, for calls of `tokens` tokens at the active level. The first call for a class of shapes takes some
// milliseconds; levels without a table lookup answer at once.
format::TernaryPacking fastest_packing(int64_t n, int64_t k, int64_t tokens);

}  // namespace tilewright::ternary_linear
