// SPDX-License-Identifier: Apache-2.0
// The 4-bit KV cache: where a token's codes and scales lie, and how one is quantized.
//
// A row is one token of one KV head, D values long: ceil(D/2) bytes of codes, low nibble = even d, high nibble = odd d,
// stored as q + 8 with q in [-7, 7]; and one scale for each group of 128 values, the last group short. An odd D leaves
// the last high nibble unused (written as q = 0). value = q * scale.
//
//   scale = max(max|x|, 1e-5) / 7, rounded to the type it is stored in; q = round_half_even(x / scale), clamped
//
// so that integers are rounded against the scale that will multiply them (FireQ, arXiv 2505.20839). A group with a NaN or
// an infinity gets a NaN scale and q = 0: every query that sees the token becomes NaN, nothing else does.
#pragma once

#include <cstdint>

#include "core/memory.h"
#include "format/header.h"

namespace tilewright::format {

struct Int4Kv {
  static constexpr int kGroup = 128;
  static constexpr int kZero = 8;
  static constexpr int kMaxCode = 7;
  static constexpr int kBitsPerCode = 4;
  static constexpr float kLeastAbsmax = 1e-5f;

  static constexpr int64_t row_bytes(int64_t head_dim) { return (head_dim + 1) / 2; }
  static constexpr int64_t groups(int64_t head_dim) { return (head_dim + kGroup - 1) / kGroup; }
  static constexpr uint8_t pair(int even, int odd) {
    return static_cast<uint8_t>((even + kZero) | ((odd + kZero) << kBitsPerCode));
  }
  // q of element d of a row.
  static constexpr int code(const uint8_t* row, int64_t d) {
    const uint8_t byte = row[d / 2];
    return (d % 2 == 0 ? byte & 0x0f : byte >> kBitsPerCode) - kZero;
  }
};

}  // namespace tilewright::format
