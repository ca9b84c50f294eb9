// SPDX-License-Identifier: Apache-2.0
// float16 to integers and back; docs/reference/accelerator-contract.md, "float16". Python: edge/contract/half.py.
#pragma once

#include "tilewright_hls/integer.h"
#include "tilewright_hls/tables.h"

namespace tilewright_hls {

using Half = ap_uint<16>;
using Magnitude = ap_uint<15>;
using Wide = long long;

inline constexpr int kMinExponent = -24;
inline constexpr Wide kMaxBits = 0x7BFF;

// One register for all units; bits are only ever set.
using StatusWord = ap_uint<16>;
inline void raise(StatusWord& status, int bit, bool when) {
  if (when) status = static_cast<Wide>(status) | (Wide{1} << bit);
}

struct Split {
  bool negative;
  ap_uint<11> mantissa;
  ap_int<6> exponent;
  Wide value() const { return negative ? -static_cast<Wide>(mantissa) : static_cast<Wide>(mantissa); }
};

inline Magnitude magnitude_of(Half x, StatusWord& status) {
#pragma HLS inline
  const Wide bits = static_cast<Wide>(x) & 0x7FFF;
  raise(status, kNonfinite, bits >= 0x7C00);
  if (bits > 0x7C00) return 0;
  return bits > kMaxBits ? kMaxBits : bits;
}

inline Split split_magnitude(Magnitude bits) {
#pragma HLS inline
  const Wide field = static_cast<Wide>(bits) >> 10, fraction = static_cast<Wide>(bits) & 0x3FF;
  return {false, field > 0 ? fraction + 1024 : fraction, (field > 0 ? field : 1) - 25};
}

inline Split split(Half x, StatusWord& status) {
#pragma HLS inline
  Split out = split_magnitude(magnitude_of(x, status));
  out.negative = (static_cast<Wide>(x) >> 15) != 0;
  return out;
}

// A priority encoder in hardware.
inline int bit_length(Wide value) {
#pragma HLS inline
  int length = 0;
  for (int bit = 0; bit < 63; ++bit) {
#pragma HLS unroll
    if ((value >> bit) & 1) length = bit + 1;
  }
  return length;
}

inline Wide shift_down(Wide value, Wide by) { return value >> (by > 63 ? 63 : by); }

// value / 2^shift to the nearest integer, ties to even; value >= 0.
inline Wide shift_right_even(Wide value, Wide shift) {
#pragma HLS inline
  if (shift <= 0) return value;
  if (shift > 62) shift = 62;
  const Wide floor = value >> shift, rest = value - (floor << shift), half = Wide{1} << (shift - 1);
  return floor + ((rest > half || (rest == half && (floor & 1))) ? 1 : 0);
}

// value * 2^exponent rounded once to float16; |value| < 2^62.
inline Half pack(Wide value, Wide exponent, StatusWord& status) {
#pragma HLS inline
  const bool negative = value < 0;
  const Wide magnitude = negative ? -value : value;
  Wide place = bit_length(magnitude) - 11 + exponent;
  if (place < kMinExponent) place = kMinExponent;
  const Wide shift = place - exponent;
  const Wide rounded = shift > 0 ? shift_right_even(magnitude, shift) : magnitude << (shift < -11 ? 11 : -shift);
  Wide bits = rounded;
  if (rounded >= 1024) bits = (((place > 100 ? 100 : place) + 25) << 10) + rounded - 1024;
  raise(status, kSaturated, bits > kMaxBits);
  if (bits > kMaxBits) bits = kMaxBits;
  return negative && bits > 0 ? bits | 0x8000 : bits;
}

// The place of a value among W-bit integers with a common exponent; bits below are dropped toward zero.
template <int W>
ap_int<W + 1> aligned(const Split& x, Wide top) {
#pragma HLS inline
  const ap_uint<W> magnitude = shift_down(static_cast<Wide>(x.mantissa) << (W - 11), top - x.exponent);
  return x.negative ? -static_cast<Wide>(magnitude) : static_cast<Wide>(magnitude);
}

// mantissa * 2^exponent, normalised.
struct Factor {
  ap_uint<17> mantissa;
  ap_int<9> exponent;
};

inline Factor normal(Wide value, Wide exponent) {
  const int shift = bit_length(value) - 17;
  if (shift <= 0) return {value << -shift, exponent + shift};
  const Wide rounded = shift_right_even(value, shift);
  if (rounded >> 17) return {rounded >> 1, exponent + shift + 1};
  return {rounded, exponent + shift};
}

// floor(dividend / divisor), one bit a step: a restoring divider. divisor < 2^49.
inline Wide divide(Wide dividend, Wide divisor, int dividend_bits, int zeros = 0) {
  Wide rest = 0, quotient = 0;
  for (int bit = dividend_bits + zeros - 1; bit >= 0; --bit) {
#pragma HLS pipeline II = 1
    rest = (rest << 1) | (bit >= zeros ? (dividend >> (bit - zeros)) & 1 : 0);
    quotient <<= 1;
    if (rest >= divisor) {
      rest -= divisor;
      quotient |= 1;
    }
  }
  return quotient;
}

// floor(sqrt(value)) of a 34-bit value, one bit a step.
inline Wide root(Wide value) {
  Wide result = 0, rest = value;
  for (int bit = 16; bit >= 0; --bit) {
#pragma HLS pipeline II = 1
    const Wide trial = ((result << 1) | (Wide{1} << bit)) << bit;
    if (rest >= trial) {
      rest -= trial;
      result |= Wide{1} << bit;
    }
  }
  return result;
}

}  // namespace tilewright_hls
