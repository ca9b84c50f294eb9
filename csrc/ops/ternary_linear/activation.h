// SPDX-License-Identifier: Apache-2.0
// Quantization of activations: one definition for all devices. A quotient of a token by its scale is at most
// 127 (1 + 2^-23) in magnitude, so it rounds to 127 at most and needs no clamp.
#pragma once

namespace tilewright::ternary_linear {

inline constexpr float kInt8Limit = 127.0f;
inline constexpr float kLeastAbsmax = 1e-5f;

}  // namespace tilewright::ternary_linear
