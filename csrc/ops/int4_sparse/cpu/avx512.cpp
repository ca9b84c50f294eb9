// SPDX-License-Identifier: Apache-2.0
// 512-bit vectors with VNNI: vpdpbusd takes four codes of a lane at once. Sixteen listed rows, or 128 outputs, share a pass,
// so that a lane is a row (an output) and int4_linear's float operations run in its order, lane by lane.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/memory.h"
#include "isa/vec_avx512.h"
#include "ops/int4_sparse/kernels.h"

namespace tilewright::int4_sparse::avx512 {
namespace {

using V = Vec16;
using format::Int4;
using format::OffsetKind;
using format::ScaleType;

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

inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }

// ---- rows ----

constexpr int kRows = 16;  // of a pass: one a lane
constexpr int kPairRows = 8;
constexpr int kLaneGroups = 16;  // scales and offsets that are turned at once

// A chain of int4_linear: one multiply-add a group, a run of groups that share an activation scale at a time.
struct Chain {
  V::F part = V::zero(), total = V::zero();
};

// Two groups of 32 columns, or 64 columns of one: codes of eight rows times x, each row's sixteen lanes added to one for
// each half. Result: 128-bit lanes (first half of rows 0..3), (second half of them), (first of 4..7), (second of 4..7).
inline V::I eight_rows(const uint8_t* const* rows, int64_t at, __mmask32 inside, V::I x) {
  const V::I nibble = _mm512_set1_epi8(Int4::kMaxCode);
  const auto dot = [&](int r) {
    const __m256i packed = _mm256_maskz_loadu_epi8(inside, rows[r] + at);
    const V::I both = _mm512_inserti64x4(_mm512_castsi256_si512(packed), _mm256_srli_epi16(packed, 4), 1);
    return _mm512_dpbusd_epi32(V::set1i(0), V::andi(both, nibble), x);
  };
  const auto fold = [&](int r) {  // rows r and r + 4
    const V::I a = dot(r), b = dot(r + 4);
    return V::addi(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee));
  };
  const auto add_words = [](V::I a, V::I b) {
    return V::addi(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const V::I a = add_words(fold(0), fold(1)), b = add_words(fold(2), fold(3));
  return V::addi(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Columns [k, k + 64) of 16 rows times x: sums of the first and of the second 32 columns, a row a lane.
inline void sixteen_rows(const uint8_t* const* rows, const Activation& x, int64_t k, int64_t columns, V::I* first,
                         V::I* second) {
  const bool whole = k + 64 <= columns;
  const V::I natural = _mm512_maskz_loadu_epi8(whole ? ~__mmask64{0} : __mmask64{0xffffffff}, x.codes + k);
  // As a run of 16 bytes holds them: low nibbles of both halves, then high ones.
  const V::I turned = _mm512_shuffle_i64x2(natural, natural, 0xd8);
  const __mmask32 inside = whole ? 0xffffffffu : 0xffffu;
  const V::I low = eight_rows(rows, k / 2, inside, turned), high = eight_rows(rows + kPairRows, k / 2, inside, turned);
  *first = _mm512_shuffle_i64x2(low, high, 0x88);
  *second = _mm512_shuffle_i64x2(low, high, 0xdd);
}

// to[g][r] = from[r][g] for 16 x 16 numbers of 16 bits.
inline void turn(const __m256i* from, uint16_t (*to)[kRows]) {
  __m256i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm256_unpacklo_epi16(from[2 * i], from[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi16(from[2 * i], from[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int h = 0; h < 2; ++h) {
      b[4 * i + 2 * h] = _mm256_unpacklo_epi32(a[4 * i + h], a[4 * i + 2 + h]);
      b[4 * i + 2 * h + 1] = _mm256_unpackhi_epi32(a[4 * i + h], a[4 * i + 2 + h]);
    }
  }
  for (int i = 0; i < 2; ++i) {
    for (int h = 0; h < 4; ++h) {
      a[8 * i + 2 * h] = _mm256_unpacklo_epi64(b[8 * i + h], b[8 * i + 4 + h]);
      a[8 * i + 2 * h + 1] = _mm256_unpackhi_epi64(b[8 * i + h], b[8 * i + 4 + h]);
    }
  }
  for (int h = 0; h < 8; ++h) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to[h]), _mm256_permute2x128_si256(a[h], a[8 + h], 0x20));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to[8 + h]), _mm256_permute2x128_si256(a[h], a[8 + h], 0x31));
  }
}

// Scales and offsets of 16 groups of 16 rows, a row a lane.
template <ScaleType kScale, OffsetKind kOffset>
class RowLanes {
 public:
  RowLanes(const format::Int4RowsView& w, const uint8_t* const* rows) : w_(w), rows_(rows) {}

  void read(int64_t first) {
    first_ = first;
    const auto count = static_cast<int>(std::min<int64_t>(kLaneGroups, w_.groups - first));
    const auto inside = static_cast<__mmask16>((1u << count) - 1u);
    if constexpr (kScale != ScaleType::kFloat32) read16(w_.scales_at, first, inside, scales_);
    if constexpr (kOffset == OffsetKind::kMinimum && kScale != ScaleType::kFloat32) {
      read16(w_.offsets_at, first, inside, offsets_);
    }
    if constexpr (kOffset == OffsetKind::kZeroPoint) {
      __m256i wide[kRows];
      for (int r = 0; r < kRows; ++r) {
        wide[r] = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(inside, rows_[r] + w_.offsets_at + first));
      }
      turn(wide, offsets_);
    }
  }

  V::F scale(int64_t g) const { return floats(scales_, w_.scales_at, g); }
  V::F minimum(int64_t g) const { return floats(offsets_, w_.offsets_at, g); }
  V::I zero(int64_t g) const {
    if constexpr (kOffset == OffsetKind::kMinimum) return V::set1i(0);
    if constexpr (kOffset == OffsetKind::kSymmetric) return V::set1i(Int4::kSymmetricZero);
    return _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(offsets_[g - first_])));
  }

 private:
  void read16(int64_t at, int64_t first, __mmask16 inside, uint16_t (*to)[kRows]) const {
    __m256i found[kRows];
    for (int r = 0; r < kRows; ++r) found[r] = _mm256_maskz_loadu_epi16(inside, rows_[r] + at + 2 * first);
    turn(found, to);
  }

  V::F floats(const uint16_t (*turned)[kRows], int64_t at, int64_t g) const {
    if constexpr (kScale == ScaleType::kFloat32) {
      alignas(64) float lane[kRows];
      for (int r = 0; r < kRows; ++r) std::memcpy(lane + r, rows_[r] + at + 4 * g, sizeof(float));
      return V::load(lane);
    } else {
      return V::load_scales<kScale>(reinterpret_cast<const uint8_t*>(turned[g - first_]), 0);
    }
  }

  const format::Int4RowsView& w_;
  const uint8_t* const* rows_;
  int64_t first_ = 0;
  alignas(32) uint16_t scales_[kLaneGroups][kRows];
  alignas(32) uint16_t offsets_[kLaneGroups][kRows];
};

template <ScaleType kScale, OffsetKind kOffset>
void pass(const format::Int4RowsView& w, const Activation& x, const uint8_t* const* rows, const uint8_t* const* ahead,
          float* out) {
  RowLanes<kScale, kOffset> lanes(w, rows);
  Chain chain;
  V::I dots = V::set1i(0);
  int64_t g = 0, run = 0, group_end = w.group, run_end = std::min(w.k, x.scale_group);
  const auto end_group = [&] {
    if (g % kLaneGroups == 0) lanes.read(g);
    const V::I sum = V::set1i(x.sums[g]);
    const V::I dot = kOffset == OffsetKind::kMinimum ? dots : V::subi(dots, V::muli(lanes.zero(g), sum));
    chain.part = V::fma(lanes.scale(g), V::to_float(dot), chain.part);
    if constexpr (kOffset == OffsetKind::kMinimum) {
      chain.part = V::fma(lanes.minimum(g), V::to_float(sum), chain.part);
    }
    dots = V::set1i(0);
    ++g;
    if (group_end >= run_end) {
      chain.total = V::fma(V::set1(x.scales[run++]), chain.part, chain.total);
      chain.part = V::zero();
      run_end = std::min(w.k, run_end + x.scale_group);
    }
    group_end += w.group;
  };
  for (int64_t k = 0; k < w.k; k += 64) {
    // The row that follows in each lane: no hardware prefetcher sees which rows come.
    if (k < w.row_bytes) {
      for (int r = 0; r < kRows; ++r) prefetch(ahead[r] + k);
    }
    V::I first, second;
    sixteen_rows(rows, x, k, w.k, &first, &second);
    dots = V::addi(dots, first);
    if (k + 32 >= std::min(group_end, w.k)) end_group();
    if (k + 32 >= w.k) break;
    dots = V::addi(dots, second);
    if (k + 64 >= std::min(group_end, w.k)) end_group();
  }
  V::store(out, _mm512_mul_ps(chain.total, V::set1(1.0f / w.per_tensor_scale)));
}

// ---- columns ----

constexpr int64_t kOutputs = 128;  // of a pass: a cache line of each input's run
constexpr int kQuad = 4;  // inputs of one vpdpbusd
constexpr int kVectors = 8;  // of sums: 128 outputs

// Run of an input of group g, without the division that finds the group.
inline const uint8_t* run_of(const format::Int4ColumnsView& w, int64_t g, int64_t input) {
  return w.block(g) + w.codes_at + (input - g * w.group) * w.run_bytes;
}

// Four inputs' codes with 128 outputs, added to sums of 16 byte positions a vector: [2 q] low, [2 q + 1] high nibbles of
// byte 16 L + 4 q + j in lane j of 128-bit lane L.
inline void add_quad(const format::Int4ColumnsView& w, const int8_t* codes, const int32_t* inputs, int64_t count,
                     int64_t g, int64_t at, V::I* sums) {
  const V::I nibble = _mm512_set1_epi8(Int4::kMaxCode);
  uint32_t quad = 0;
  V::I z[kQuad];
  for (int i = 0; i < kQuad; ++i) {
    const bool has = i < count;
    const int64_t input = inputs[has ? i : 0];
    if (has) quad |= uint32_t{static_cast<uint8_t>(codes[input])} << (8 * i);
    z[i] = V::loadi(run_of(w, g, input) + at);
  }
  const V::I x = V::set1i(static_cast<int32_t>(quad));
  const V::I low01 = _mm512_unpacklo_epi8(z[0], z[1]), high01 = _mm512_unpackhi_epi8(z[0], z[1]);
  const V::I low23 = _mm512_unpacklo_epi8(z[2], z[3]), high23 = _mm512_unpackhi_epi8(z[2], z[3]);
  const V::I bytes[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                         _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
  for (int q = 0; q < 4; ++q) {
    sums[2 * q] = _mm512_dpbusd_epi32(sums[2 * q], V::andi(bytes[q], nibble), x);
    const V::I high = V::andi(_mm512_srli_epi16(bytes[q], 4), nibble);
    sums[2 * q + 1] = _mm512_dpbusd_epi32(sums[2 * q + 1], high, x);
  }
}

// Sums as add_quad leaves them -> 16 neighbouring outputs a vector.
inline void untangle(const V::I* sums, V::I* outputs) {
  for (int high = 0; high < 2; ++high) {
    const V::I a = _mm512_shuffle_i64x2(sums[high], sums[2 + high], 0x44);
    const V::I b = _mm512_shuffle_i64x2(sums[high], sums[2 + high], 0xee);
    const V::I c = _mm512_shuffle_i64x2(sums[4 + high], sums[6 + high], 0x44);
    const V::I d = _mm512_shuffle_i64x2(sums[4 + high], sums[6 + high], 0xee);
    outputs[2 * high] = _mm512_shuffle_i64x2(a, c, 0x88);
    outputs[2 * high + 1] = _mm512_shuffle_i64x2(a, c, 0xdd);
    outputs[4 + 2 * high] = _mm512_shuffle_i64x2(b, d, 0x88);
    outputs[4 + 2 * high + 1] = _mm512_shuffle_i64x2(b, d, 0xdd);
  }
}

// Asks for outputs [first, last) of a share of a group's runs, and of its scales, before its products: hardware
// prefetchers do not see which inputs come.
inline void ask_for(const format::Int4ColumnsView& w, const Listed& listed, int64_t g, int64_t share, int64_t shares,
                    int64_t first, int64_t last) {
  if (g >= w.groups || listed.starts[g] == listed.starts[g + 1]) return;
  const int64_t start = listed.starts[g], count = listed.starts[g + 1] - start;
  for (int64_t i = start + count * share / shares; i < start + count * (share + 1) / shares; ++i) {
    const uint8_t* run = run_of(w, g, listed.inputs[i]);
    for (int64_t at = first / 2; at < (last + 1) / 2; at += kCacheLine) prefetch(run + at);
  }
  const int64_t bytes = format::scale_bytes(w.scale_type), n = first + share * kOutputs;
  for (int64_t at = n * bytes; at < std::min(n + kOutputs, last) * bytes; at += kCacheLine) {
    prefetch(w.block(g) + at);
    if (w.offset_kind == OffsetKind::kMinimum) prefetch(w.block(g) + w.offsets_at + at);
  }
}

// part[128] += one group's products.
template <ScaleType kScale, OffsetKind kOffset>
void add_group(const format::Int4ColumnsView& w, const Activation& x, const Listed& listed, int64_t g, int64_t n,
               float* part) {
  V::I sums[kVectors] = {}, dots[kVectors];
  const int64_t last = listed.starts[g + 1];
  for (int64_t i = listed.starts[g]; i < last; i += kQuad) {
    add_quad(w, x.codes, listed.inputs + i, last - i, g, n / 2, sums);
  }
  untangle(sums, dots);
  const uint8_t* scales = w.block(g);
  const uint8_t* offsets = scales + w.offsets_at;
  const V::I sum = V::set1i(x.sums[g]);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = n + V::kLanes * v;
    if (at >= w.padded_n) return;
    V::I zero = V::set1i(kOffset == OffsetKind::kSymmetric ? Int4::kSymmetricZero : 0);
    if constexpr (kOffset == OffsetKind::kZeroPoint) zero = V::load_zero_points(offsets + at);
    const V::I dot = kOffset == OffsetKind::kMinimum ? dots[v] : V::subi(dots[v], V::muli(zero, sum));
    V::F p = V::load(part + V::kLanes * v);
    p = V::fma(V::load_scales<kScale>(scales, at), V::to_float(dot), p);
    if constexpr (kOffset == OffsetKind::kMinimum) {
      p = V::fma(V::load_scales<kScale>(offsets, at), V::to_float(sum), p);
    }
    V::store(part + V::kLanes * v, p);
  }
}

template <ScaleType kScale, OffsetKind kOffset>
void some_columns(const format::Int4ColumnsView& w, const Activation& x, const Listed& listed, int64_t first,
                  int64_t last, float* y, float* workspace) {
  const int64_t width = round_up(last - first, kOutputs);
  float* total = workspace;
  float* part = workspace + width;
  std::memset(total, 0, static_cast<size_t>(2 * width) * sizeof(float));
  bool any = false;
  const int64_t passes = width / kOutputs;
  for (int64_t i = 0; i < passes; ++i) ask_for(w, listed, 0, i, passes, first, last);
  for (int64_t g = 0, run = 0; g < w.groups; ++g) {
    const bool has = listed.starts[g] != listed.starts[g + 1];
    for (int64_t i = 0; i < passes; ++i) {
      ask_for(w, listed, g + 1, i, passes, first, last);
      // A group without inputs adds zeros, which change nothing.
      const int64_t c = i * kOutputs;
      if (has) add_group<kScale, kOffset>(w, x, listed, g, first + c, part + c);
    }
    any |= has;
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

void rows(const format::Int4RowsView& w, const Activation& x, const int32_t* list, int64_t count, float* out) {
  const auto point_at = [&](int64_t first, const uint8_t** to) {
    for (int r = 0; r < kRows; ++r) to[r] = w.row(list[std::min(first + r, count - 1)]);
  };
  if (count == 0) return;
  const uint8_t* now[kRows];
  const uint8_t* ahead[kRows];
  point_at(0, now);
  with_format(w, [&](auto scale, auto offset) {
    for (int64_t i = 0; i < count; i += kRows) {
      point_at(std::min(i + kRows, count - 1), ahead);
      alignas(64) float y[kRows];
      pass<scale.value, offset.value>(w, x, now, ahead, y);
      std::memcpy(out + i, y, static_cast<size_t>(std::min<int64_t>(kRows, count - i)) * sizeof(float));
      std::memcpy(now, ahead, sizeof(now));
    }
  });
}

void columns(const format::Int4ColumnsView& w, const Activation& x, const Listed& listed, int64_t first, int64_t last,
             float* y, float* workspace) {
  with_format(w, [&](auto scale, auto offset) {
    some_columns<scale.value, offset.value>(w, x, listed, first, last, y, workspace);
  });
}

}  // namespace tilewright::int4_sparse::avx512
