// SPDX-License-Identifier: Apache-2.0
// Sixteen lanes. Everything is in an unnamed namespace: a copy for each file that includes it, compiled for that file's
// level, so that no wide instruction can be linked into code that runs on a smaller processor.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "format/int4.h"

namespace tilewright {
namespace {

struct Vec16 {
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static I set1i(int32_t v) { return _mm512_set1_epi32(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store_first(float* p, F v, int64_t n) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static I loadi(const void* p) { return _mm512_loadu_si512(p); }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F select_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }

  static I addi(I a, I b) { return _mm512_add_epi32(a, b); }
  static I subi(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I muli(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I andi(I a, I b) { return _mm512_and_si512(a, b); }
  static I ori(I a, I b) { return _mm512_or_si512(a, b); }
  static I maxu(I a, I b) { return _mm512_max_epu32(a, b); }
  template <int kBits>
  static I shift_right(I a) {
    return _mm512_srli_epi32(a, kBits);
  }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }
  static I bits(F a) { return _mm512_castps_si512(a); }
  static F from_bits(I a) { return _mm512_castsi512_ps(a); }
  static uint32_t reduce_maxu(I a) { return _mm512_reduce_max_epu32(a); }
  static int32_t reduce_addi(I a) { return _mm512_reduce_add_epi32(a); }
  static float reduce_add(F a) { return _mm512_reduce_add_ps(a); }

  static void store_int8(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  // Upper halves of the lanes, in the pair order of activation.h.
  static void store_bf16_pairs(uint16_t* p, I v) {
    const __m256i order = _mm256_setr_epi16(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutexvar_epi16(order, words));
  }

  template <format::ScaleType kType>
  static F load_scales(const uint8_t* base, int64_t index) {
    if constexpr (kType == format::ScaleType::kFloat32) {
      return _mm512_loadu_ps(reinterpret_cast<const float*>(base) + index);
    } else {
      const auto* p = reinterpret_cast<const uint16_t*>(base) + index;
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (kType == format::ScaleType::kFloat16) return _mm512_cvtph_ps(half);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
  }
  static I load_zero_points(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

 private:
  static __mmask16 mask(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u); }
};

}  // namespace
}  // namespace tilewright
