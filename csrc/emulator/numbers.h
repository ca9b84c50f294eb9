// SPDX-License-Identifier: Apache-2.0
// Narrow floating-point formats as the machine converts them: to nearest even, FP8 saturates, NaN stays NaN.
#pragma once

#include <cstdint>

namespace tilewright::emulator {

float f16_to_float(uint16_t bits);
float bf16_to_float(uint16_t bits);
float e4m3_to_float(uint8_t bits);
uint16_t float_to_f16(float value);
uint16_t float_to_bf16(float value);
uint8_t float_to_e4m3(float value);

}  // namespace tilewright::emulator
