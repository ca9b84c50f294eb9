// SPDX-License-Identifier: Apache-2.0
// Quantizing one token, for any vector width. The quotient x / scale is rounded, not a product with the reciprocal: the
// codes are then those of the textbook formula at every level.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/memory.h"
#include "format/int4.h"
#include "ops/int4_linear/activation.h"
#include "ops/int4_linear/kernels.h"

namespace tilewright::int4_linear {
namespace {

// e4m3 keeps 3 mantissa bits: round the float's bit pattern at bit 20; below the smallest normal 2^-6 the spacing is
// fixed at 2^-9, which is the spacing of floats near 1.5 * 2^14.
template <class V>
typename V::F round_e4m3(typename V::F value) {
  const auto sign = V::andi(V::bits(value), V::set1i(std::numeric_limits<int32_t>::min()));
  const auto magnitude = V::from_bits(V::andi(V::bits(value), V::set1i(0x7fffffff)));
  const auto bits = V::bits(magnitude);
  const auto odd = V::andi(V::template shift_right<20>(bits), V::set1i(1));
  const auto normal = V::from_bits(V::andi(V::addi(V::addi(bits, V::set1i(0x7ffff)), odd), V::set1i(~0xfffff)));
  const auto anchor = V::set1(0x1.8p14f);
  const auto subnormal = V::sub(V::add(magnitude, anchor), anchor);
  const auto rounded = V::select_less(magnitude, V::set1(0x1p-6f), subnormal, normal);
  return V::from_bits(V::ori(V::bits(V::min(rounded, V::set1(kFp8Limit))), sign));
}

// scales[A] of a token: absmax / limit, 1 for zeros, NaN all over when anything is not finite; true if all is finite.
template <class V>
bool token_scales(const float* x, const TokenCut& cut, float limit, float* scales) {
  bool finite = true;
  int64_t count = 0;
  for (int64_t first = 0; first < cut.k; first += cut.scale_group) {
    const int64_t last = std::min(cut.k, first + cut.scale_group);
    auto largest = V::set1i(0);
    for (int64_t i = first; i < last; i += V::kLanes) {
      const auto bits = V::bits(i + V::kLanes <= last ? V::load(x + i) : V::load_first(x + i, last - i));
      largest = V::maxu(largest, V::andi(bits, V::set1i(0x7fffffff)));
    }
    const uint32_t bits = V::reduce_maxu(largest);
    finite &= bits < 0x7f800000u;
    float absmax;
    std::memcpy(&absmax, &bits, sizeof(absmax));
    const float scale = absmax / limit;
    scales[count++] = scale == 0.0f ? 1.0f : scale;
  }
  if (!finite) std::fill_n(scales, count, std::numeric_limits<float>::quiet_NaN());
  return finite;
}

// Calls put(k, quotient) for each vector of x / scale: zero past K, and everywhere for a token that is not finite.
// A vector never straddles two scales, since scale groups are multiples of 16.
template <class V, class Put>
void each_quotient(const float* x, const TokenCut& cut, const float* scales, bool finite, const Put& put) {
  for (int64_t i = 0; i < cut.k; i += V::kLanes) {
    if (!finite) {
      put(i, V::zero());
      continue;
    }
    const auto value = i + V::kLanes <= cut.k ? V::load(x + i) : V::load_first(x + i, cut.k - i);
    put(i, V::div(value, V::set1(scales[i / cut.scale_group])));
  }
}

// Stores of a whole vector may pass Kp, so the last vector goes through a buffer.
template <class V, class Code, class Store>
void store_within(Code* codes, int64_t i, int64_t kp, const Store& store) {
  if (i + V::kLanes <= kp) {
    store(codes + i);
  } else {
    Code tail[V::kLanes];
    store(tail);
    std::memcpy(codes + i, tail, static_cast<size_t>(kp - i) * sizeof(Code));
  }
}

template <class V>
void vector_prepare_int8(const float* x, const TokenCut& cut, void* codes, float* scales, void* group_sums) {
  const bool finite = token_scales<V>(x, cut, kInt8Limit, scales);
  const int64_t kp = round_up(cut.k, format::Int4::kColsPerStep);
  auto* sums = static_cast<int32_t*>(group_sums);
  auto sum = V::set1i(0);
  each_quotient<V>(x, cut, scales, finite, [&](int64_t i, typename V::F quotient) {
    const auto code = V::to_int(quotient);
    store_within<V>(static_cast<int8_t*>(codes), i, kp, [&](int8_t* p) { V::store_int8(p, code); });
    sum = V::addi(sum, code);
    if ((i + V::kLanes) % cut.group == 0 || i + V::kLanes >= cut.k) {
      sums[i / cut.group] = V::reduce_addi(sum);
      sum = V::set1i(0);
    }
  });
}

template <class V>
void vector_prepare_fp8(const float* x, const TokenCut& cut, void* codes, float* scales, void* group_sums) {
  const bool finite = token_scales<V>(x, cut, kFp8Limit, scales);
  const int64_t kp = round_up(cut.k, format::Int4::kColsPerStep);
  auto* sums = static_cast<float*>(group_sums);
  auto sum = V::zero();
  each_quotient<V>(x, cut, scales, finite, [&](int64_t i, typename V::F quotient) {
    const auto value = round_e4m3<V>(quotient);
    store_within<V>(static_cast<uint16_t*>(codes), i, kp, [&](uint16_t* p) { V::store_bf16_pairs(p, V::bits(value)); });
    sum = V::add(sum, value);
    if ((i + V::kLanes) % cut.group == 0 || i + V::kLanes >= cut.k) {
      sums[i / cut.group] = V::reduce_add(sum);
      sum = V::zero();
    }
  });
}

}  // namespace
}  // namespace tilewright::int4_linear
