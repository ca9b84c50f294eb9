// SPDX-License-Identifier: Apache-2.0
// Words of eight cached codes (q + 8, the first in the low bits) as operands of the matrix units. Both forms are exact.
#pragma once

#include "hopper/arithmetic.h"
#include "hopper/hopper.h"

namespace tilewright::int4_fp8_attention::cuda {

using hopper::U128;

// Eight codes, in order, as e4m3: a table of eight bytes for each sign, looked up with three bits, then chosen by the
// fourth. Bytes are normal numbers, which the matrix unit's short sum keeps more bits of than of subnormal ones.
TILEWRIGHT_DEVICE void decode_e4m3(uint32_t word, uint32_t& low, uint32_t& high) {
  constexpr uint32_t kFrom0 = 0x44403800u, kFrom4 = 0x4e4c4a48u;  // 0 1 2 3, 4 5 6 7
  constexpr uint32_t kFromMinus8 = 0xcaccced0u, kFromMinus4 = 0xb8c0c4c8u;
  const uint32_t index = word & 0x77777777u;
  const uint32_t choice = hopper::and_or(~(word >> 1), 0x44444444u, 0x32103210u);
  low = __byte_perm(__byte_perm(kFrom0, kFrom4, index), __byte_perm(kFromMinus8, kFromMinus4, index), choice);
  const uint32_t index_high = index >> 16;
  high = __byte_perm(__byte_perm(kFrom0, kFrom4, index_high), __byte_perm(kFromMinus8, kFromMinus4, index_high),
                     choice >> 16);
}

// Codes 0 and 4 of a word as a pair of bfloat16: 128 + u has the bits 0x4300 | u, and 136 less is the integer. Exact.
TILEWRIGHT_DEVICE uint32_t decode_pair(uint32_t word) {
  constexpr uint32_t kCodes = 0x000f000fu, kHundred28 = 0x43004300u, kHundred36 = 0x43084308u;
  return hopper::sub_bf16x2(hopper::and_or(word, kCodes, kHundred28), kHundred36);
}
TILEWRIGHT_DEVICE U128 decode_bf16(uint32_t word) {
  return {decode_pair(word), decode_pair(word >> 4), decode_pair(word >> 8), decode_pair(word >> 12)};
}

}  // namespace tilewright::int4_fp8_attention::cuda
