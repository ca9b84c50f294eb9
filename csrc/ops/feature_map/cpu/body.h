// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/lanes.h.
#include <algorithm>
#include <cmath>
#include <limits>

#include "isa/lanes.h"
#include "ops/feature_map/kernels.h"

namespace tilewright::feature_map::TILEWRIGHT_LEVEL {
namespace {

// Of lambdas that return lanes: in a register file of another level they could not even be called.
#define TILEWRIGHT_LANES __attribute__((always_inline))

constexpr float kFloor = 1e-12f;
constexpr float kNormEps = 1e-6f;

// out[i] = f(y[i]) for all n; y may be out. The lanes past the end are zero when they come in, and left out.
template <class F>
TILEWRIGHT_INLINE void map(const float* y, int64_t n, float* out, const F& f) {
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store_lanes(out + i, f(load_lanes(y + i)));
  if (whole < n) store_first_lanes(out + whole, f(load_first_lanes(y + whole, n - whole)), n - whole);
}

// Sum of f(y[i]), f(0) being 0.
template <class F>
TILEWRIGHT_INLINE float sum(const float* y, int64_t n, const F& f) {
  const int64_t whole = n - n % kLanes;
  Lanes sums = {};
  for (int64_t i = 0; i < whole; i += kLanes) sums += f(load_lanes(y + i));
  if (whole < n) sums += f(load_first_lanes(y + whole, n - whole));
  return sum_lanes(sums);
}

// The largest sign * y[i].
float largest(const float* y, int64_t n, float sign) {
  float top = -std::numeric_limits<float>::infinity();
  const int64_t whole = n - n % kLanes;
  if (whole > 0) {
    Lanes tops = sign * load_lanes(y);
    for (int64_t i = kLanes; i < whole; i += kLanes) {
      const Lanes v = sign * load_lanes(y + i);
      tops = v > tops ? v : tops;
    }
    float lane[kLanes];
    store_lanes(lane, tops);
    top = *std::max_element(lane, lane + kLanes);
  }
  for (int64_t i = whole; i < n; ++i) top = std::max(top, sign * y[i]);
  return top;
}

void exponentials(const float* y, int64_t n, float sign, float shift, float* out) {
  map(y, n, out, [=](const Lanes& v) TILEWRIGHT_LANES { return exp_lanes(sign * v - shift); });
}

// out = factor max(out / sum out, floor)
void divide_by_sum(float* out, int64_t n, float floor, float factor) {
  const float inverse = 1.0f / sum(out, n, [](const Lanes& v) TILEWRIGHT_LANES { return v; });
  const Lanes least = all_lanes(floor);
  map(out, n, out, [=](const Lanes& v) TILEWRIGHT_LANES {
    const Lanes share = v * inverse;
    return (share < least ? least : share) * factor;
  });
}

void softmax(const float* y, int64_t n, float sign, float floor, float factor, float* out) {
  exponentials(y, n, sign, largest(y, n, sign), out);
  divide_by_sum(out, n, floor, factor);
}

void joint_softmax(const float* y, int64_t n, float factor, float* out) {
  const float top = 2.0f * std::max(largest(y, n, 1.0f), largest(y, n, -1.0f));
  exponentials(y, n, 2.0f, top, out);
  exponentials(y, n, -2.0f, top, out + n);
  divide_by_sum(out, 2 * n, kFloor, factor);
}

void exp_pair(const float* y, int64_t n, float factor, float* out) {
  exponentials(y, n, 1.0f, largest(y, n, 1.0f), out);
  exponentials(y, n, -1.0f, largest(y, n, -1.0f), out + n);
  map(out, 2 * n, out, [=](const Lanes& v) TILEWRIGHT_LANES { return v * factor; });
}

void capped_exp_pair(const float* y, int64_t n, float cap, float factor, float* out) {
  const auto held = [=](const Lanes& v) TILEWRIGHT_LANES {
    const Lanes below = v > cap ? all_lanes(cap) : v;
    return below < -cap ? all_lanes(-cap) : below;
  };
  map(y, n, out, [=](const Lanes& v) TILEWRIGHT_LANES { return exp_lanes(held(v)) * factor; });
  map(y, n, out + n, [=](const Lanes& v) TILEWRIGHT_LANES { return exp_lanes(-held(v)) * factor; });
}

TILEWRIGHT_INLINE Lanes sigmoid(const Lanes& v) { return 1.0f / (1.0f + exp_lanes(-v)); }

// log(1 + u) for u in [0, 1]: 2 atanh(u / (2 + u)), whose argument is at most 1/3; the terms left out are below 2^-29.
TILEWRIGHT_INLINE Lanes log_of_one_plus(const Lanes& u) {
  const Lanes z = u / (2.0f + u);
  const Lanes s = z * z;
  Lanes p = s * (1.0f / 15.0f) + 1.0f / 13.0f;
  p = p * s + 1.0f / 11.0f;
  p = p * s + 1.0f / 9.0f;
  p = p * s + 1.0f / 7.0f;
  p = p * s + 0.2f;
  p = p * s + 1.0f / 3.0f;
  return 2.0f * z + (2.0f * z) * (s * p);
}

// min(y, 0) - log(1 + e^-|y|)
TILEWRIGHT_INLINE Lanes log_sigmoid(const Lanes& v) {
  const Lanes below = v < 0.0f ? v : all_lanes(0.0f);
  return below - log_of_one_plus(exp_lanes(v < 0.0f ? v : -v));
}

void unit_norm(const float* y, int64_t n, float factor, float* out) {
  const float squares = sum(y, n, [](const Lanes& v) TILEWRIGHT_LANES { return v * v; });
  const float scale = factor / std::sqrt(squares + kNormEps);
  map(y, n, out, [=](const Lanes& v) TILEWRIGHT_LANES { return v * scale; });
}

void apply_function(const Problem& p, const float* y, float* out) {
  const int64_t n = p.inner;
  const float factor = p.factor;
  switch (p.function) {
    case Function::kSoftmax: return softmax(y, n, 1.0f, 0.0f, factor, out);
    case Function::kSoftmaxPair:
      softmax(y, n, 1.0f, kFloor, factor, out);
      return softmax(y, n, -1.0f, kFloor, factor, out + n);
    case Function::kExpPair: return exp_pair(y, n, factor, out);
    case Function::kCappedExpPair: return capped_exp_pair(y, n, p.cap, factor, out);
    case Function::kJointSoftmax: return joint_softmax(y, n, factor, out);
    case Function::kElu:
      return map(y, n, out,
                 [=](const Lanes& v) TILEWRIGHT_LANES { return (v > 0.0f ? v + 1.0f : exp_lanes(v)) * factor; });
    case Function::kRelu:
      // The comparison is this way round so that NaN stays.
      return map(y, n, out, [=](const Lanes& v) TILEWRIGHT_LANES { return (v < 0.0f ? all_lanes(0.0f) : v) * factor; });
    case Function::kLogSigmoid:
      return map(y, n, out, [=](const Lanes& v) TILEWRIGHT_LANES { return log_sigmoid(v) * factor; });
    case Function::kSigmoid:
      return map(y, n, out, [=](const Lanes& v) TILEWRIGHT_LANES { return sigmoid(v) * factor; });
    case Function::kComplement:
      return map(y, n, out, [=](const Lanes& v) TILEWRIGHT_LANES { return sigmoid(-v) * factor; });
    case Function::kUnitNorm: return unit_norm(y, n, factor, out);
    case Function::kSilu:
      return map(y, n, out, [=](const Lanes& v) TILEWRIGHT_LANES { return v * sigmoid(v) * factor; });
  }
}

// y = W^T x + b, W [size, inner].
void project(const Problem& p, const float* x, const float* weight, const float* bias, float* y) {
  if (bias == nullptr) {
    std::fill(y, y + p.inner, 0.0f);
  } else {
    std::copy(bias, bias + p.inner, y);
  }
  for (int64_t d = 0; d < p.size; ++d) {
    const float* row = weight + d * p.inner;
    const float value = x[d];
    const int64_t whole = p.inner - p.inner % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) store_lanes(y + i, load_lanes(y + i) + value * load_lanes(row + i));
    for (int64_t i = whole; i < p.inner; ++i) y[i] += value * row[i];
  }
}

}  // namespace

void apply(const Problem& p) {
  alignas(64) float y[kMaxSize];
  const int64_t width = features(p.function, p.inner);
  for (int64_t h = 0; h < p.heads; ++h) {
    const float* x = p.x + h / p.heads_per_source * p.size;
    const float* bias = p.bias == nullptr ? nullptr : p.bias + h * p.bias_stride;
    if (p.weight == nullptr) {
      std::copy(x, x + p.size, y);
      for (int64_t i = 0; bias != nullptr && i < p.inner; ++i) y[i] += bias[i];
    } else {
      project(p, x, p.weight + h * p.weight_stride, bias, y);
    }
    apply_function(p, y, p.out + h * width);
  }
}

}  // namespace tilewright::feature_map::TILEWRIGHT_LEVEL
