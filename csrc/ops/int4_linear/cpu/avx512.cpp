// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI: codes are the unsigned operand of vpdpbusd, activations the signed one.
#include "ops/int4_linear/cpu/vector_avx512.h"
#include "ops/int4_linear/cpu/vector_fp8.h"

namespace tilewright::int4_linear::avx512 {
namespace {

// A 32-bit lane holds a group's products and, from the start, minus its zero point times its sum of activations.
static_assert(int64_t{2} * Int4::kMaxCode * 128 * Int4::kMaxGroup < INT32_MAX, "groups too long for 32 bits");

struct Int8Dot {
  static constexpr int kVectors = 2;     // columns 0..3 and 4..7 of a step
  static constexpr int kCodeBytes = 1;
  using Acc = __m512i;
  using Sum = int32_t;

  explicit Int8Dot(bool) {}

  template <OffsetKind kOffset>
  static Acc start(Sum sum) {
    return _mm512_set1_epi32(kOffset == OffsetKind::kSymmetric ? -Int4::kSymmetricZero * sum : 0);
  }
  static Acc start(Sum sum, __m512i zero) {
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_mullo_epi32(zero, _mm512_set1_epi32(sum)));
  }
  void decode(__m512i packed, __m512i* vectors) const {
    const __m512i nibble = _mm512_set1_epi8(Int4::kMaxCode);
    vectors[0] = _mm512_and_si512(packed, nibble);
    vectors[1] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
  }
  static Acc dot(Acc acc, __m512i weights, __m512i x) { return _mm512_dpbusd_epi32(acc, weights, x); }
  static __m512 to_float(Acc acc) { return _mm512_cvtepi32_ps(acc); }
  static __m512 broadcast_sum(Sum sum) { return _mm512_cvtepi32_ps(_mm512_set1_epi32(sum)); }
};

}  // namespace

void int8_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  items_avx512<Int8Dot>(p, plan, first, last);
}

void fp8_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  fp8_fma_items<Vec16>(p, plan, first, last);
}

void prepare_int8(const float* x, const TokenCut& cut, void* codes, float* scales, void* group_sums) {
  vector_prepare_int8<Vec16>(x, cut, codes, scales, group_sums);
}

void prepare_fp8(const float* x, const TokenCut& cut, void* codes, float* scales, void* group_sums) {
  vector_prepare_fp8<Vec16>(x, cut, codes, scales, group_sums);
}

}  // namespace tilewright::int4_linear::avx512
