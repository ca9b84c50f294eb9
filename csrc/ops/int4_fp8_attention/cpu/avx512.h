// SPDX-License-Identifier: Apache-2.0
// What the two AVX-512 levels share. Internal linkage: each level's file compiles its own copy under its own flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "ops/int4_fp8_attention/cpu/shape.h"

namespace tilewright::int4_fp8_attention {
namespace {

struct Avx512 {
  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kRows = 6;  // 6 x 4 accumulators, 4 vectors of the panel and the broadcasts: 32 registers
  static constexpr int64_t kCols = 4;
  static constexpr int64_t kDirectRows = 6;
  using F = __m512;
  using Mask = __mmask16;

  static F load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* out, F x) { _mm512_storeu_ps(out, x); }
  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
  static float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
  static F select(Mask mask, F x, F otherwise) { return _mm512_mask_blend_ps(mask, otherwise, x); }

  // Lanes [first, last), clipped.
  static Mask range(int64_t first, int64_t last) {
    const auto below = [](int64_t n) { return n <= 0 ? 0u : n >= kLanes ? 0xffffu : (1u << n) - 1u; };
    return static_cast<Mask>(below(last) & ~below(first));
  }

  // 2^x for x <= 0: 2^floor(x) times a polynomial in the fraction, 1 + f (...) of degree 5, minimax in relative error
  // on [0, 1): 8.3e-8, in float arithmetic 1.5e-7. Exact at integers; 0 for -inf; NaN for NaN.
  static F exp2(F x) {
    const F f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    F y = set1(0x1.e974fap-10f);
    y = fma(y, f, set1(0x1.277856p-7f));
    y = fma(y, f, set1(0x1.c91ce6p-5f));
    y = fma(y, f, set1(0x1.ebdb56p-3f));
    y = fma(y, f, set1(0x1.62e4bap-1f));
    y = fma(y, f, set1(1.0f));
    return _mm512_scalef_ps(y, x);
  }

  static float exp2_of(float x) { return _mm512_cvtss_f32(exp2(set1(x))); }

  // Scales of tokens, stride bytes apart, as floats.
  static void load_scales(const uint8_t* source, int64_t stride, format::ScaleType type, int64_t tokens, float* out) {
    const bool wide = type == format::ScaleType::kFloat32;
    if (stride != format::scale_bytes(type)) {
      for (int64_t t = 0; t < tokens; ++t) out[t] = format::load_scale(source + t * stride, 0, type);
      return;
    }
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const Mask mask = range(0, tokens - t);
      const __m512i bits =
          wide ? _mm512_maskz_loadu_epi32(mask, source + 4 * t)
               : _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, source + 2 * t)), 16);
      _mm512_mask_storeu_ps(out + t, mask, _mm512_castsi512_ps(bits));
    }
  }

  static constexpr int64_t kPieceBytes = 32;

  // At most 32 bytes of a row from an offset; zeros past its end.
  static __m256i piece(const uint8_t* row, int64_t offset, int64_t row_bytes) {
    const int64_t left = row_bytes - offset;
    if (left >= kPieceBytes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + offset));
    const __mmask32 mask = left <= 0 ? 0u : (1u << left) - 1u;
    return _mm256_maskz_loadu_epi8(mask, row + offset);
  }
  static __m512i two_pieces(const Rows& rows, int64_t low, int64_t high, int64_t offset) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(piece(rows[low], offset, rows.bytes)),
                              piece(rows[high], offset, rows.bytes), 1);
  }

  // Eight 4-byte words of 16 rows from a token, transposed: lane t of out[c] is word first_word + c of row token + t.
  static void transpose_words(const Rows& rows, int64_t token, int64_t first_word, __m512i (&out)[8]) {
    __m512i r[8], pairs[8], quads[8];
    // Rows are dealt so that the last stage, which joins 128-bit quarters, leaves them in order.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = two_pieces(rows, token + i, token + 4 + i, 4 * first_word);
      r[4 + i] = two_pieces(rows, token + 8 + i, token + 12 + i, 4 * first_word);
    }
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int half = 0; half < 8; half += 4) {
      quads[half] = _mm512_unpacklo_epi64(pairs[half], pairs[half + 2]);
      quads[half + 1] = _mm512_unpackhi_epi64(pairs[half], pairs[half + 2]);
      quads[half + 2] = _mm512_unpacklo_epi64(pairs[half + 1], pairs[half + 3]);
      quads[half + 3] = _mm512_unpackhi_epi64(pairs[half + 1], pairs[half + 3]);
    }
    for (int c = 0; c < 4; ++c) {
      out[c] = _mm512_shuffle_i32x4(quads[c], quads[4 + c], _MM_SHUFFLE(2, 0, 2, 0));
      out[4 + c] = _mm512_shuffle_i32x4(quads[c], quads[4 + c], _MM_SHUFFLE(3, 1, 3, 1));
    }
  }

  // Whether any of the bfloat16 is an infinity or NaN.
  static bool has_nonfinite(__m512i halves) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(halves, exponent), exponent) != 0;
  }

  // out[d] = sums of d times factor, from the order of V (see shape.h) to the order of elements.
  static void write_row(const Shape& shape, const float* sums, float factor, float* out) {
    const F f = set1(factor);
    if (!shape.int4()) {
      for (int64_t d = 0; d < shape.head_dim; d += kLanes) {
        _mm512_mask_storeu_ps(out + d, range(0, shape.head_dim - d), mul(load(sums + d), f));
      }
      return;
    }
    for (int64_t first = 0; first < shape.head_dim; first += 4 * kLanes) {
      F x[4], pairs[4], quads[4];
      for (int j = 0; j < 4; ++j) x[j] = mul(load(sums + first + j * kLanes), f);
      for (int j = 0; j < 2; ++j) {
        pairs[2 * j] = _mm512_unpacklo_ps(x[2 * j], x[2 * j + 1]);
        pairs[2 * j + 1] = _mm512_unpackhi_ps(x[2 * j], x[2 * j + 1]);
      }
      // quads[i]: quarter q holds the four j of lane i + 4 q.
      quads[0] = shuffle_pairs<0x44>(pairs[0], pairs[2]);
      quads[1] = shuffle_pairs<0xee>(pairs[0], pairs[2]);
      quads[2] = shuffle_pairs<0x44>(pairs[1], pairs[3]);
      quads[3] = shuffle_pairs<0xee>(pairs[1], pairs[3]);
      for (int64_t quarter = 0; quarter < 4; ++quarter) {
        const F row = gather_quarter(quads, quarter);
        const int64_t d = first + quarter * kLanes;
        _mm512_mask_storeu_ps(out + d, range(0, shape.head_dim - d), row);
      }
    }
  }

 private:
  template <int kSelect>
  static F shuffle_pairs(F a, F b) {
    return _mm512_shuffle_ps(a, b, kSelect);
  }
  static F gather_quarter(const F (&quads)[4], int64_t quarter) {
    const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(4 * quarter)),
                                           _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 0, 1, 2, 3, 16, 17, 18, 19));
    const F low = _mm512_permutex2var_ps(quads[0], index, quads[1]);
    const F high = _mm512_permutex2var_ps(quads[2], index, quads[3]);
    return _mm512_shuffle_f32x4(low, high, _MM_SHUFFLE(1, 0, 1, 0));
  }
};

}  // namespace
}  // namespace tilewright::int4_fp8_attention
