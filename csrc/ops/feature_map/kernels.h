// SPDX-License-Identifier: Apache-2.0
// A function of each head's vector of one token: what linear attention reads in place of queries and keys, and its gates.
// With y = W x + b, or x itself:
//
//   kSoftmax        softmax(y)                                             Liger (arXiv 2503.01496)
//   kSoftmaxPair    [softmax(y), softmax(-y)], at least 1e-12              Hedgehog (arXiv 2402.04347)
//   kExpPair        [exp(y - max y), exp(min y - y)]                       likewise, its other stable form
//   kCappedExpPair  [exp(c), exp(-c)], c = y held within +-cap             likewise, the definition
//   kJointSoftmax   softmax([2y, -2y]), at least 1e-12
//   kElu            elu(y) + 1                                             arXiv 2006.16236
//   kRelu           max(y, 0)
//   kLogSigmoid     log(sigmoid(y)), a gate
//   kSigmoid        sigmoid(y)
//   kComplement     1 - sigmoid(y)
//   kUnitNorm       y / sqrt(sum y^2 + 1e-6)
//   kSilu           y sigmoid(y)
//
// times a factor. Exponentials of less than -87 are e^-87.
#pragma once

#include <cstdint>

#include "isa/isa.h"

namespace tilewright::feature_map {

enum class Function : int64_t {
  kSoftmax,
  kSoftmaxPair,
  kExpPair,
  kCappedExpPair,
  kJointSoftmax,
  kElu,
  kRelu,
  kLogSigmoid,
  kSigmoid,
  kComplement,
  kUnitNorm,
  kSilu,
};
inline constexpr int64_t kFunctions = 12;

constexpr bool makes_pair(Function f) {
  return f == Function::kSoftmaxPair || f == Function::kExpPair || f == Function::kCappedExpPair ||
         f == Function::kJointSoftmax;
}
// Features from n values of y.
constexpr int64_t features(Function f, int64_t n) { return makes_pair(f) ? 2 * n : n; }

inline constexpr int64_t kMaxSize = 4096;

struct Problem {
  Function function;
  float factor;
  float cap;  // kCappedExpPair
  int64_t heads;  // of the result
  int64_t heads_per_source;  // that read one vector of x
  int64_t size;  // D <= kMaxSize
  int64_t inner;  // values of y a head, <= kMaxSize; D without a weight
  const float* weight;  // [heads, D, inner] or null
  const float* bias;  // [heads, inner] or null
  int64_t weight_stride, bias_stride;  // 0: all heads share one
  const float* x;  // [heads / heads_per_source, D]
  float* out;  // [heads, features(function, inner)]
};

using Apply = void (*)(const Problem&);

namespace generic {
void apply(const Problem&);
}
namespace avx2 {
void apply(const Problem&);
}
namespace avx512 {
void apply(const Problem&);
}

inline Apply kernel() {
#if defined(__x86_64__)
  static constexpr isa::Table<Apply> table{{generic::apply, avx2::apply, avx512::apply, avx512::apply}};
  return table.pick();
#else
  return generic::apply;
#endif
}

}  // namespace tilewright::feature_map
