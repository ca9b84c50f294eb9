// SPDX-License-Identifier: Apache-2.0
// 256-bit vectors, compiled once a level: u4 x s8 products in 16-bit lanes (vpmaddubsw). Memory is the bound: wider
// vectors read no faster.
#include <cmath>
#include <type_traits>

#include "isa/vec_avx2.h"
#include "ops/int4_sparse/kernels.h"

namespace tilewright::int4_sparse::TILEWRIGHT_LEVEL {
namespace {

using V = Vec8;
using format::Int4;
using format::OffsetKind;
using format::ScaleType;

constexpr int64_t kOutputs = format::Int4Sparse::kOutputs;
// Of one 16-bit lane: pairs of inputs before it is widened.
constexpr int64_t kPairs = 8;
static_assert(kPairs * 2 * Int4::kMaxCode * 128 <= INT16_MAX, "widen earlier");
constexpr int64_t kGroupsAtOnce = 8;

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

template <class View, class Use>
void with_format(const View& w, const Use& use) {
  const auto with_scale = [&](auto scale) {
    switch (w.offset_kind) {
      case OffsetKind::kSymmetric: return use(scale, Constant<OffsetKind::kSymmetric>{});
      case OffsetKind::kMinimum: return use(scale, Constant<OffsetKind::kMinimum>{});
      case OffsetKind::kZeroPoint: return use(scale, Constant<OffsetKind::kZeroPoint>{});
    }
  };
  switch (w.scale_type) {
    case ScaleType::kFloat16: return with_scale(Constant<ScaleType::kFloat16>{});
    case ScaleType::kBFloat16: return with_scale(Constant<ScaleType::kBFloat16>{});
    case ScaleType::kFloat32: return with_scale(Constant<ScaleType::kFloat32>{});
  }
}

inline void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

// Sums of codes times activations of one group of a row, in eight lanes.
inline __m256i group_lanes(const uint8_t* codes, const int8_t* x, int64_t columns) {
  const __m128i nibble = _mm_set1_epi8(Int4::kMaxCode);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum = _mm256_setzero_si256();
  for (int64_t k = 0; k < columns; k += 32) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k / 2));
    const __m256i w = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(packed, 4), nibble), _mm_and_si128(packed, nibble));
    const __m256i products = _mm256_maddubs_epi16(w, V::loadi(x + k));
    sum = V::addi(sum, _mm256_madd_epi16(products, ones));
  }
  return sum;
}

// Lane g: the sum of all lanes of sums[g].
inline __m256i add_lanes(const __m256i* sums) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[4], sums[5]), _mm256_hadd_epi32(sums[6], sums[7]));
  return V::addi(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

template <ScaleType kScale>
inline float scale_at(const uint8_t* base, int64_t index) {
  if constexpr (kScale == ScaleType::kFloat16) {
    uint16_t bits;
    std::memcpy(&bits, base + index * 2, sizeof(bits));
    return _cvtsh_ss(bits);
  }
  if constexpr (kScale == ScaleType::kBFloat16) {
    uint16_t half;
    std::memcpy(&half, base + index * 2, sizeof(half));
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  float value;
  std::memcpy(&value, base + index * 4, sizeof(value));
  return value;
}

template <ScaleType kScale, OffsetKind kOffset>
float one_row(const format::Int4RowsView& w, const Activation& x, const uint8_t* row) {
  const uint8_t* scales = row + w.scales_at;
  const uint8_t* offsets = row + w.offsets_at;
  float total = 0.0f, part = 0.0f;
  int64_t run = 0, run_end = std::min(w.k, x.scale_group);
  for (int64_t g = 0; g < w.groups; g += kGroupsAtOnce) {
    const int64_t count = std::min(kGroupsAtOnce, w.groups - g);
    __m256i sums[kGroupsAtOnce] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = (g + i) * w.group;
      sums[i] = group_lanes(row + first / 2, x.codes + first, std::min(w.group, w.k - first));
    }
    alignas(32) int32_t dots[kGroupsAtOnce];
    _mm256_store_si256(reinterpret_cast<__m256i*>(dots), add_lanes(sums));
    for (int64_t i = 0; i < count; ++i) {
      const int32_t sum = x.sums[g + i];
      int32_t zero = kOffset == OffsetKind::kSymmetric ? Int4::kSymmetricZero : 0;
      if constexpr (kOffset == OffsetKind::kZeroPoint) zero = offsets[g + i];
      part = std::fma(scale_at<kScale>(scales, g + i), static_cast<float>(dots[i] - zero * sum), part);
      if constexpr (kOffset == OffsetKind::kMinimum) {
        part = std::fma(scale_at<kScale>(offsets, g + i), static_cast<float>(sum), part);
      }
      if ((g + i + 1) * w.group >= run_end) {
        total = std::fma(x.scales[run++], part, total);
        part = 0.0f;
        run_end = std::min(w.k, run_end + x.scale_group);
      }
    }
  }
  return total * (1.0f / w.per_tensor_scale);
}

// Adds pairs of inputs [i, last) of one group to 64 outputs, at most kPairs of them, in 16 bits; then widens.
// narrow: outputs 0..7 | 16..23, 8..15 | 24..31 of each half of 32.
inline void add_pairs(const format::Int4ColumnsView& w, const int8_t* codes, const int32_t* inputs, int64_t count,
                      int64_t at, __m256i* wide) {
  const __m256i nibble = _mm256_set1_epi8(Int4::kMaxCode);
  __m256i narrow[4] = {};
  for (int64_t i = 0; i < count; i += 2) {
    const int64_t a = inputs[i];
    const bool pair = i + 1 < count;
    const int64_t b = pair ? inputs[i + 1] : a;
    const auto low = static_cast<uint8_t>(codes[a]), high = static_cast<uint8_t>(pair ? codes[b] : 0);
    const __m256i x = _mm256_set1_epi16(static_cast<int16_t>(low | high << 8));
    const __m256i first = V::loadi(w.run(a) + at), second = V::loadi(w.run(b) + at);
    const __m256i first_low = _mm256_and_si256(first, nibble), second_low = _mm256_and_si256(second, nibble);
    const __m256i first_high = _mm256_and_si256(_mm256_srli_epi16(first, 4), nibble);
    const __m256i second_high = _mm256_and_si256(_mm256_srli_epi16(second, 4), nibble);
    const auto add = [&](int into, __m256i both) {
      narrow[into] = _mm256_add_epi16(narrow[into], _mm256_maddubs_epi16(both, x));
    };
    add(0, _mm256_unpacklo_epi8(first_low, second_low));
    add(1, _mm256_unpackhi_epi8(first_low, second_low));
    add(2, _mm256_unpacklo_epi8(first_high, second_high));
    add(3, _mm256_unpackhi_epi8(first_high, second_high));
  }
  for (int half = 0; half < 2; ++half) {
    const __m256i lo = narrow[2 * half], hi = narrow[2 * half + 1];
    __m256i* to = wide + 4 * half;
    to[0] = V::addi(to[0], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(lo)));
    to[1] = V::addi(to[1], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(hi)));
    to[2] = V::addi(to[2], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(lo, 1)));
    to[3] = V::addi(to[3], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(hi, 1)));
  }
}

// part[64] += one group's products with 64 outputs.
template <ScaleType kScale, OffsetKind kOffset>
void add_group(const format::Int4ColumnsView& w, const Activation& x, const Listed& listed, int64_t g, int64_t n,
               float* part) {
  __m256i wide[8] = {};
  const int64_t last = listed.starts[g + 1];
  for (int64_t i = listed.starts[g]; i < last; i += 2 * kPairs) {
    add_pairs(w, x.codes, listed.inputs + i, std::min(2 * kPairs, last - i), n / 2, wide);
  }
  const uint8_t* scales = w.block(g);
  const uint8_t* offsets = scales + w.offsets_at;
  const __m256i sum = V::set1i(x.sums[g]);
  for (int v = 0; v < 8; ++v) {
    __m256i zero = V::set1i(kOffset == OffsetKind::kSymmetric ? Int4::kSymmetricZero : 0);
    if constexpr (kOffset == OffsetKind::kZeroPoint) zero = V::load_zero_points(offsets + n + 8 * v);
    const __m256i dot = kOffset == OffsetKind::kMinimum ? wide[v] : V::subi(wide[v], V::muli(zero, sum));
    __m256 p = V::load(part + 8 * v);
    p = V::fma(V::load_scales<kScale>(scales, n + 8 * v), V::to_float(dot), p);
    if constexpr (kOffset == OffsetKind::kMinimum) {
      p = V::fma(V::load_scales<kScale>(offsets, n + 8 * v), V::to_float(sum), p);
    }
    V::store(part + 8 * v, p);
  }
}

// The runs and scales of a group, before its products: hardware prefetchers do not see which inputs come.
inline void ask_for(const format::Int4ColumnsView& w, const Listed& listed, int64_t g, int64_t first, int64_t last) {
  if (g >= w.groups || listed.starts[g] == listed.starts[g + 1]) return;
  for (int64_t i = listed.starts[g]; i < listed.starts[g + 1]; ++i) {
    const uint8_t* run = w.run(listed.inputs[i]);
    for (int64_t at = first / 2; at < (last + 1) / 2; at += kCacheLine) prefetch(run + at);
  }
  const int64_t bytes = format::scale_bytes(w.scale_type);
  for (int64_t at = first * bytes; at < last * bytes; at += kCacheLine) {
    prefetch(w.block(g) + at);
    if (w.offset_kind == OffsetKind::kMinimum) prefetch(w.block(g) + w.offsets_at + at);
  }
}

template <ScaleType kScale, OffsetKind kOffset>
void some_columns(const format::Int4ColumnsView& w, const Activation& x, const Listed& listed, int64_t first,
                  int64_t last, float* y, float* workspace) {
  const int64_t width = (last - first + kOutputs - 1) / kOutputs * kOutputs;
  float* total = workspace;
  float* part = workspace + width;
  std::memset(total, 0, static_cast<size_t>(2 * width) * sizeof(float));
  bool any = false;
  ask_for(w, listed, 0, first, last);
  for (int64_t g = 0, run = 0; g < w.groups; ++g) {
    ask_for(w, listed, g + 1, first, last);
    // A group without inputs adds zeros, which change nothing.
    if (listed.starts[g] != listed.starts[g + 1]) {
      any = true;
      for (int64_t c = 0; c < width; c += kOutputs) add_group<kScale, kOffset>(w, x, listed, g, first + c, part + c);
    }
    if ((g + 1) * w.group < std::min(w.k, (run + 1) * x.scale_group)) continue;
    const float scale = x.scales[run++];
    if (!any && scale == scale) continue;
    for (int64_t c = 0; c < width; c += V::kLanes) {
      V::store(total + c, V::fma(V::set1(scale), V::load(part + c), V::load(total + c)));
      V::store(part + c, V::zero());
    }
    any = false;
  }
  const float inverse = 1.0f / w.per_tensor_scale;
  for (int64_t c = 0; c < last - first; ++c) y[c] = total[c] * inverse;
}

}  // namespace

void rows(const format::Int4RowsView& w, const Activation& x, const int32_t* rows, int64_t count, float* out) {
  constexpr int64_t kRowsAhead = 4;
  with_format(w, [&](auto scale, auto offset) {
    for (int64_t i = 0; i < count; ++i) {
      if (i + kRowsAhead < count) {
        const uint8_t* ahead = w.row(rows[i + kRowsAhead]);
        for (int64_t at = 0; at < w.row_bytes && at < 1024; at += kCacheLine) prefetch(ahead + at);
      }
      out[i] = one_row<scale.value, offset.value>(w, x, w.row(rows[i]));
    }
  });
}

void columns(const format::Int4ColumnsView& w, const Activation& x, const Listed& listed, int64_t first, int64_t last,
             float* y, float* workspace) {
  with_format(w, [&](auto scale, auto offset) {
    some_columns<scale.value, offset.value>(w, x, listed, first, last, y, workspace);
  });
}

}  // namespace tilewright::int4_sparse::TILEWRIGHT_LEVEL
