// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/lanes.h. Products and sums are rounded one by one: memory is the bound here.
#include <cmath>

#include "isa/lanes.h"
#include "ops/sparse_gated_mlp/kernels.h"
#include "ops/sparse_gated_mlp/plan.h"

namespace tilewright::sparse_gated_mlp::TILEWRIGHT_LEVEL {
namespace {

constexpr int kTokensPerTile = 4;
constexpr int64_t kRowsPerPass = 4;        // of W_down^T: each read and write of a partial sum serves as many rows
constexpr int64_t kRowsAhead = 2 * kRowsPerPass;
constexpr int64_t kLinesAhead = 32;
// Prefetches are into the second cache, which can wait for several times as many lines as the first.
constexpr int64_t kPrefetchBytes = 4096;   // ahead within a row, and from its end into the next row that is needed

TILEWRIGHT_INLINE Lanes load_weights(const float* p) { return load_lanes(p); }
TILEWRIGHT_INLINE Lanes load_weights(const uint16_t* p) {
  using ShortLanes = uint16_t __attribute__((vector_size(32)));
  using WordLanes = uint32_t __attribute__((vector_size(64)));
  ShortLanes half;
  std::memcpy(&half, p, sizeof(half));
  const WordLanes bits = __builtin_convertvector(half, WordLanes) << 16;
  Lanes v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

template <class Weight>
TILEWRIGHT_INLINE Lanes load_first_weights(const Weight* p, int64_t n) {
  Weight buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(Weight));
  return load_weights(buffer);
}

// Asks for what will be read kPrefetchBytes from now: further in this row, or in the next one.
template <class Weight>
struct Ahead {
  static constexpr int64_t kDistance = kPrefetchBytes / static_cast<int64_t>(sizeof(Weight));
  static constexpr int64_t kPerLine = 64 / static_cast<int64_t>(sizeof(Weight));

  const Weight* row;
  const Weight* next;  // null: none
  int64_t width;

  // The lines of columns [k, k + 2 kLanes) at that distance.
  TILEWRIGHT_INLINE void operator()(int64_t k) const {
    int64_t at = k + kDistance;
    const Weight* from = row;
    if (at >= width) {
      if (next == nullptr) return;
      from = next;
      at -= width;
      if (at >= width) return;
    }
    __builtin_prefetch(from + at, 0, 2);
    if constexpr (kPerLine < 2 * kLanes) __builtin_prefetch(from + at + kPerLine, 0, 2);
  }
};

// out[t] = row . x[t]; column k goes to partial sum k mod 32, in order, the sums are added by halving.
template <int kTokens, class Weight>
TILEWRIGHT_INLINE void dot(const Weight* row, const Weight* next, const float* x, int64_t stride, int64_t width,
                           float* out) {
  const Ahead<Weight> ahead{row, next, width};
  Lanes even[kTokens] = {}, odd[kTokens] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= width; k += 2 * kLanes) {
    ahead(k);
    const Lanes first = load_weights(row + k), second = load_weights(row + k + kLanes);
    for (int t = 0; t < kTokens; ++t) {
      even[t] += first * load_lanes(x + t * stride + k);
      odd[t] += second * load_lanes(x + t * stride + k + kLanes);
    }
  }
  if (const int64_t rest = width - k; rest > 0) {
    const int64_t low = rest < kLanes ? rest : kLanes;
    const Lanes first = load_first_weights(row + k, low);
    for (int t = 0; t < kTokens; ++t) even[t] += first * load_first_lanes(x + t * stride + k, low);
    if (rest > kLanes) {
      const Lanes second = load_first_weights(row + k + kLanes, rest - kLanes);
      for (int t = 0; t < kTokens; ++t) odd[t] += second * load_first_lanes(x + t * stride + k + kLanes, rest - kLanes);
    }
  }
  for (int t = 0; t < kTokens; ++t) out[t] = sum_lanes(even[t] + odd[t]);
}

// use(t, row . x[t]) for every token.
template <class Weight, class Use>
TILEWRIGHT_INLINE void dots(const Problem<Weight, float>& p, const Weight* row, const Weight* next, const Use& use) {
  int64_t t = 0;
  float sums[kTokensPerTile];
  for (; t + kTokensPerTile <= p.tokens; t += kTokensPerTile) {
    dot<kTokensPerTile>(row, next, p.x + t * p.stride, p.stride, p.hidden, sums);
    for (int i = 0; i < kTokensPerTile; ++i) use(t + i, sums[i]);
  }
  for (; t < p.tokens; ++t) {
    dot<1>(row, next, p.x + t * p.stride, p.stride, p.hidden, sums);
    use(t, sums[0]);
  }
}

TILEWRIGHT_INLINE Lanes gelu(const Lanes& z) {
  float lane[kLanes];
  store_lanes(lane, z);
  // In float64, from the side that does not cancel.
  for (float& v : lane) v = static_cast<float>(0.5 * double{v} * std::erfc(-double{v} * 0.70710678118654752440));
  return load_lanes(lane);
}

template <Function kFunction>
TILEWRIGHT_INLINE Lanes apply(const Lanes& z) {
  if constexpr (kFunction == Function::kSilu) return z / (1.0f + exp_lanes(-z));
  if constexpr (kFunction == Function::kGelu) return gelu(z);
  // 0.5 (1 + tanh u) is 1 / (1 + e^-2u).
  if constexpr (kFunction == Function::kGeluTanh) {
    const Lanes u = 0.79788456080286535588f * (z + 0.044715f * (z * z * z));
    return z / (1.0f + exp_lanes(-2.0f * u));
  }
  return z < 0.0f ? Lanes{} : z;
}

template <Function kFunction>
void activate_as(const float* z, const float* threshold, int64_t threshold_stride, int64_t n, float* a, uint8_t* kept) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    const Lanes value = apply<kFunction>(count == kLanes ? load_lanes(z + i) : load_first_lanes(z + i, count));
    const Lanes least = threshold_stride == 0 ? all_lanes(*threshold) : load_first_lanes(threshold + i, count);
    const IntLanes dropped = (value < 0.0f ? -value : value) < least;
    store_first_lanes(a + i, dropped ? Lanes{} : value, count);
    using ByteLanes = int8_t __attribute__((vector_size(kLanes)));
    const ByteLanes ones = __builtin_convertvector(dropped, ByteLanes) + 1;  // dropped is 0 or -1
    std::memcpy(kept + i, &ones, static_cast<size_t>(count));
  }
}

template <class Weight>
void gate(const Problem<Weight, float>& p, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; ++j) {
    const Weight* row = p.gate + j * p.stride;
    const float bias = p.gate_bias == nullptr ? 0.0f : p.gate_bias[j];
    dots(p, row, j + 1 < last ? row + p.stride : nullptr,
         [&](int64_t t, float sum) { p.activation[t * p.inner + j] = p.gate_bias == nullptr ? sum : sum + bias; });
  }
  for (int64_t t = 0; t < p.tokens; ++t) {
    float* a = p.activation + t * p.inner + first;
    activate(p.function, a, p.threshold + first * p.threshold_stride, p.threshold_stride, last - first, a,
             p.kept + t * p.inner + first);
  }
}

template <class Weight>
void up(const Problem<Weight, float>& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t j = p.rows[i];
    const Weight* next = i + 1 < last ? p.up + p.rows[i + 1] * p.stride : nullptr;
    dots(p, p.up + j * p.stride, next, [&](int64_t t, float sum) {
      const float u = p.up_bias == nullptr ? sum : sum + p.up_bias[j];
      // A dropped neuron adds nothing, whatever the other factor is.
      p.h[i * p.tokens + t] = p.kept[t * p.inner + j] ? p.activation[t * p.inner + j] * u : 0.0f;
    });
  }
}

// partial[c] += h[r] w[r][c], row after row.
template <int kRows, class Weight>
TILEWRIGHT_INLINE void add_rows(const Weight* const* w, const float* h, int64_t width, float* partial) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    Lanes v = load_lanes(partial + c);
    for (int r = 0; r < kRows; ++r) v += h[r] * load_weights(w[r] + c);
    store_lanes(partial + c, v);
  }
  if (const int64_t rest = width - c; rest > 0) {
    Lanes v = load_lanes(partial + c);
    for (int r = 0; r < kRows; ++r) v += h[r] * load_first_weights(w[r] + c, rest);
    store_lanes(partial + c, v);
  }
}

// Partial sums of one class for tokens [t, t + tokens).
template <class Weight>
void add_class(const Problem<Weight, float>& p, int64_t group, int64_t t, int64_t tokens, int64_t first, int64_t width,
               int64_t padded, float* partial) {
  constexpr int64_t kPerLine = 64 / static_cast<int64_t>(sizeof(Weight));
  const int64_t end = p.class_starts[group + 1], all = p.class_starts[kClasses];
  const auto row_of = [&](int64_t i) { return p.down + p.rows[p.by_class[i]] * p.stride + first; };
  for (int64_t i = p.class_starts[group]; i < end;) {
    const int64_t count = end - i < kRowsPerPass ? end - i : kRowsPerPass;
    const Weight* w[kRowsPerPass];
    for (int64_t r = 0; r < count; ++r) w[r] = row_of(i + r);
    // Rows of a later pass, or their beginnings, from where the hardware follows.
    for (int64_t r = 0; r < kRowsPerPass && i + kRowsAhead + r < all; ++r) {
      const Weight* next = row_of(i + kRowsAhead + r);
      for (int64_t c = 0; c < width && c < kLinesAhead * kPerLine; c += kPerLine) __builtin_prefetch(next + c, 0, 2);
    }
    for (int64_t k = 0; k < tokens; ++k) {
      float h[kRowsPerPass];
      for (int64_t r = 0; r < count; ++r) h[r] = p.h[p.by_class[i + r] * p.tokens + t + k];
      float* sums = partial + k * padded;
      if (count == kRowsPerPass) {
        add_rows<kRowsPerPass>(w, h, width, sums);
      } else {
        for (int64_t r = 0; r < count; ++r) add_rows<1>(w + r, h + r, width, sums);
      }
    }
    i += count;
  }
}

// y[c] = the sums of all classes added by halving, as sum_lanes does.
void add_halves(float* partial, int64_t step, int64_t width, const float* bias, float* y) {
  for (int64_t c = 0; c < width; c += kLanes) {
    Lanes sums[kClasses];
    for (int64_t g = 0; g < kClasses; ++g) sums[g] = load_lanes(partial + g * step + c);
    for (int64_t half = kClasses / 2; half > 0; half /= 2) {
      for (int64_t g = 0; g < half; ++g) sums[g] += sums[g + half];
    }
    const int64_t count = width - c < kLanes ? width - c : kLanes;
    if (bias != nullptr) sums[0] += load_first_lanes(bias + c, count);
    store_first_lanes(y + c, sums[0], count);
  }
}

template <class Weight>
void down(const Problem<Weight, float>& p, int64_t first, int64_t last, float* workspace) {
  const int64_t width = last - first, padded = (width + kLanes - 1) / kLanes * kLanes;
  for (int64_t t = 0; t < p.tokens; t += kTokenTile) {
    const int64_t tokens = p.tokens - t < kTokenTile ? p.tokens - t : kTokenTile;
    const int64_t step = tokens * padded;
    std::memset(workspace, 0, static_cast<size_t>(kClasses * step) * sizeof(float));
    for (int64_t g = 0; g < kClasses; ++g) add_class(p, g, t, tokens, first, width, padded, workspace + g * step);
    for (int64_t k = 0; k < tokens; ++k) {
      const float* bias = p.down_bias == nullptr ? nullptr : p.down_bias + first;
      add_halves(workspace + k * padded, step, width, bias, p.y + (t + k) * p.hidden + first);
    }
  }
}

}  // namespace

void activate(Function function, const float* z, const float* threshold, int64_t threshold_stride, int64_t n, float* a,
              uint8_t* kept) {
  switch (function) {
    case Function::kSilu: return activate_as<Function::kSilu>(z, threshold, threshold_stride, n, a, kept);
    case Function::kGelu: return activate_as<Function::kGelu>(z, threshold, threshold_stride, n, a, kept);
    case Function::kGeluTanh: return activate_as<Function::kGeluTanh>(z, threshold, threshold_stride, n, a, kept);
    case Function::kRelu: return activate_as<Function::kRelu>(z, threshold, threshold_stride, n, a, kept);
  }
}

const Kernels<float> float_kernels{&gate<float>, &up<float>, &down<float>};
const Kernels<uint16_t> bfloat16_kernels{&gate<uint16_t>, &up<uint16_t>, &down<uint16_t>};

}  // namespace tilewright::sparse_gated_mlp::TILEWRIGHT_LEVEL
