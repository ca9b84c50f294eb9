// SPDX-License-Identifier: Apache-2.0
// Ternary weights in {-1, 0, 1}: two bits each, or five to a byte in base 3 (3^5 = 243 of 256 codes, 1.6 bits each).
// A trit t is stored as the digit t + 1; the digit 3 of the two-bit form and the bytes from 243 on stand for nothing.
#pragma once

#include <cstdint>

namespace tilewright::format {

struct Ternary2 {
  static constexpr int kPerByte = 4;
  static constexpr uint8_t kInvalidDigit = 3;

  static constexpr uint8_t digit(uint8_t byte, int lane) { return (byte >> (2 * lane)) & 3; }
  static constexpr int8_t trit(uint8_t byte, int lane) { return static_cast<int8_t>(digit(byte, lane) - 1); }
  static constexpr uint8_t pack(const int8_t* trits) {
    uint8_t byte = 0;
    for (int lane = 0; lane < kPerByte; ++lane) byte |= static_cast<uint8_t>((trits[lane] + 1) << (2 * lane));
    return byte;
  }
};

struct Ternary5 {
  static constexpr int kPerByte = 5;
  static constexpr int kCodes = 243;

  static constexpr int8_t trit(uint8_t byte, int lane) {
    for (; lane > 0; --lane) byte = static_cast<uint8_t>(byte / 3);
    return static_cast<int8_t>(byte % 3 - 1);
  }
  static constexpr uint8_t pack(const int8_t* trits) {
    int byte = 0;
    for (int lane = kPerByte - 1; lane >= 0; --lane) byte = 3 * byte + trits[lane] + 1;
    return static_cast<uint8_t>(byte);
  }
};

static_assert(Ternary5::kCodes <= 256 && Ternary5::kCodes == 3 * 3 * 3 * 3 * 3);

}  // namespace tilewright::format
