// SPDX-License-Identifier: Apache-2.0
// ap_int and ap_uint for a plain C++ compiler. Under TILEWRIGHT_VENDOR_HLS the vendor's own are taken.
// Stricter than those: a value that does not fit is an error, not a wrapped number, so every width in the units is checked
// by every simulation. Up to 64 bits; arithmetic is done in long long, so operands are exact.
#pragma once

#ifdef TILEWRIGHT_VENDOR_HLS
#include <ap_int.h>
#else

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace tilewright_hls {

[[noreturn]] inline void does_not_fit(const char* type, int width, long long value) {
  throw std::overflow_error(std::string(type) + "<" + std::to_string(width) + ">: " + std::to_string(value) +
                            " does not fit");
}

template <int W>
using Storage = std::conditional_t<
    (W <= 8), std::int8_t,
    std::conditional_t<(W <= 16), std::int16_t, std::conditional_t<(W <= 32), std::int32_t, std::int64_t> > >;

}  // namespace tilewright_hls

template <int W>
class ap_int {
  static_assert(W >= 1 && W <= 64);

 public:
  constexpr ap_int() = default;
  constexpr ap_int(long long value) : value_(static_cast<tilewright_hls::Storage<W> >(value)) {
    if constexpr (W < 64) {
      constexpr long long kLimit = 1LL << (W - 1);
      if (value < -kLimit || value >= kLimit) tilewright_hls::does_not_fit("ap_int", W, value);
    }
  }
  constexpr operator long long() const { return value_; }

 private:
  tilewright_hls::Storage<W> value_ = 0;
};

template <int W>
class ap_uint {
  static_assert(W >= 1 && W <= 63);

 public:
  constexpr ap_uint() = default;
  constexpr ap_uint(long long value) : value_(static_cast<Unsigned>(value)) {
    if (value < 0 || value > (1LL << W) - 1) tilewright_hls::does_not_fit("ap_uint", W, value);
  }
  constexpr operator long long() const { return static_cast<long long>(value_); }

 private:
  using Unsigned = std::make_unsigned_t<tilewright_hls::Storage<W> >;
  Unsigned value_ = 0;
};

#endif
