// SPDX-License-Identifier: Apache-2.0
// Logarithms of decays. A sum over a chunk is kept in double, and only differences of such sums are rounded: one token
// that forgets everything must not cost the tokens after it their precision.
#pragma once

#include <cmath>

#include "isa/simd.h"
#include "ops/linear_attention/problem.h"

namespace tilewright::linear_attention {
namespace {

// e^-10000 is 0 in every format, and differences of sums of it stay finite where those of -infinity would not.
inline constexpr double kLowestLog = -1e4;

template <class T>
T bounded_log(T g) {
  return g < static_cast<T>(kLowestLog) ? static_cast<T>(kLowestLog) : g;   // NaN stays
}

template <class T>
typename Simd<T>::V bounded_log(typename Simd<T>::V g) {
  const auto lowest = Simd<T>::set1(static_cast<T>(kLowestLog));
  return Simd<T>::select_less(g, lowest, lowest, g);
}

inline float exp_scalar(float x) { return std::exp(x); }
inline double exp_scalar(double x) { return std::exp(x); }

inline constexpr double kNoLog = 0.0;

// to[i] = e^(log_to[i] - log_from[i]), either one with stride 1, or 0 for the same number everywhere. Whole vectors.
template <class T>
void exp_differences(const double* log_to, int64_t to_stride, const double* log_from, int64_t from_stride, int64_t n,
                     T* to) {
  using S = Simd<T>;
  for (int64_t i = 0; i < n; i += S::kLanes) {
    T difference[S::kLanes];
    for (int64_t l = 0; l < S::kLanes; ++l) {
      difference[l] = static_cast<T>(log_to[(i + l) * to_stride] - log_from[(i + l) * from_stride]);
    }
    S::store(to + i, exp(S::load(difference)));
  }
}

}  // namespace
}  // namespace tilewright::linear_attention
