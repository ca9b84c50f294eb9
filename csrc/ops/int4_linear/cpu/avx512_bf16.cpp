// SPDX-License-Identifier: Apache-2.0
// AVX-512 BF16: e4m3 activations and INT4 codes are both exact in bfloat16, so vdpbf16ps multiplies them exactly and only
// its float32 sums round. Codes become bfloat16 by a 16-entry table (vpermw), never by shifting bits: the instruction
// treats subnormal inputs as zero, and no code or e4m3 value is subnormal as a bfloat16.
#include <array>

#include "ops/int4_linear/cpu/vector_avx512.h"

namespace tilewright::int4_linear::avx512_bf16 {
namespace {

struct Bf16Dot {
  static constexpr int kVectors = 4;  // column pairs {0,2}, {1,3}, {4,6}, {5,7}: the pair order of activation.h
  static constexpr int kCodeBytes = 2;
  using Acc = __m512;
  using Sum = float;

  explicit Bf16Dot(bool symmetric) {
    // vpermw reads five index bits; the table stands twice so that the fifth, which belongs to the next code, is free.
    alignas(64) std::array<uint16_t, 32> entries;
    for (int i = 0; i < 32; ++i) {
      const int code = i % 16 - (symmetric ? Int4::kSymmetricZero : 0);
      entries[static_cast<size_t>(i)] = format::float_to_bf16(static_cast<float>(code));
    }
    table = _mm512_load_si512(entries.data());
  }

  template <OffsetKind kOffset>
  static Acc start(Sum) {
    return _mm512_setzero_ps();
  }
  static Acc start(Sum sum, __m512i zero) { return _mm512_mul_ps(_mm512_cvtepi32_ps(zero), _mm512_set1_ps(-sum)); }
  void decode(__m512i packed, __m512i* vectors) const {
    vectors[0] = _mm512_permutexvar_epi16(packed, table);
    vectors[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 8), table);
    vectors[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4), table);
    vectors[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 12), table);
  }
  static Acc dot(Acc acc, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(acc, std::bit_cast<__m512bh>(weights), std::bit_cast<__m512bh>(x));
  }
  static __m512 to_float(Acc acc) { return acc; }
  static __m512 broadcast_sum(Sum sum) { return _mm512_set1_ps(sum); }

  __m512i table;
};

}  // namespace

void fp8_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  if (p.mode == Mode::kFold) return avx512::fp8_items(p, plan, first, last);
  items_avx512<Bf16Dot>(p, plan, first, last);
}

}  // namespace tilewright::int4_linear::avx512_bf16
