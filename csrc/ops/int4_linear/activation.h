// SPDX-License-Identifier: Apache-2.0
// How one token's activations lie in memory for the kernels.
#pragma once

#include <cstdint>

namespace tilewright::int4_linear {

// The FP8 path multiplies pairs of bfloat16. A 16-bit table lookup on the packed codes yields columns {0,2}, {1,3},
// {4,6}, {5,7} of each step of 8 side by side, so activations are stored in that order.
inline constexpr int kPairOrder[8] = {0, 2, 1, 3, 4, 6, 5, 7};

inline constexpr float kInt8Limit = 127.0f;
inline constexpr float kFp8Limit = 448.0f;

}  // namespace tilewright::int4_linear
