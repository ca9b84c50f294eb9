// SPDX-License-Identifier: Apache-2.0
// AVX-512 with the bfloat16 dot product: codes, e4m3 queries and bfloat16 caches are exact in bfloat16, so only the
// weights of the values are rounded. A float query is the sum of two bfloat16.
#include "ops/int4_fp8_attention/cpu/avx512.h"
#include "ops/int4_fp8_attention/cpu/flash.h"
#include "ops/int4_fp8_attention/kernels.h"

namespace tilewright::int4_fp8_attention::avx512_bf16 {
namespace {

struct Isa : Avx512 {
  static constexpr int64_t kDepthPerUnit = 2;
  using Unit = uint32_t;
  using U = __m512bh;

  static void store_units(Unit* out, U x) { _mm512_storeu_si512(out, reinterpret_cast<__m512i>(x)); }
  static U load_units(const Unit* x) { return reinterpret_cast<U>(_mm512_loadu_si512(x)); }
  static U broadcast_unit(const Unit* x) { return reinterpret_cast<U>(_mm512_set1_epi32(static_cast<int>(*x))); }
  static F dot(F sum, U a, U b) { return _mm512_dpbf16_ps(sum, a, b); }

  static void store_weights(Unit* out, const F (&weights)[kDepthPerUnit]) {
    _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weights[1], weights[0])));
  }

  // bfloat16 of the integers that codes stand for, twice: the lookup takes five bits of an index, a code has four.
  static __m512i code_values() {
    constexpr short k[16] = {short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040),
                             short(0xc000), short(0xbf80), 0x0000,        0x3f80,        0x4000,        0x4040,
                             0x4080,        0x40a0,        0x40c0,        0x40e0};
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(k)));
  }

  static U codes(__m512i halves, int j, __m512i table) {
    const auto shift = static_cast<unsigned>(j * format::Int4Kv::kBitsPerCode);
    return reinterpret_cast<U>(_mm512_permutexvar_epi16(_mm512_srli_epi16(halves, shift), table));
  }

  // sink(first, j, keys), for unit first + j, for the units of eight words or of those that are left; keys[s] are those
  // of 16 tokens from token + 16 s.
  template <int kSteps, class Sink>
  static void keys(const Shape& shape, const Rows& rows, int64_t token, int64_t first_word, Sink sink) {
    __m512i words[kSteps][kWordsPerStep];
    for (int s = 0; s < kSteps; ++s) transpose_words(rows, token + s * kLanes, first_word, words[s]);
    const int64_t count = std::min(kWordsPerStep, shape.words - first_word);
    const __m512i table = code_values();
    for (int64_t c = 0; c < count; ++c) {
      U x[kSteps];
      if (!shape.int4()) {
        for (int s = 0; s < kSteps; ++s) x[s] = reinterpret_cast<U>(words[s][c]);
        sink(first_word + c, 0, x);
        continue;
      }
#pragma GCC unroll 8
      for (int j = 0; j < kCodesPerLane; ++j) {
#pragma GCC unroll 8
        for (int s = 0; s < kSteps; ++s) x[s] = codes(words[s][c], j, table);
        sink((first_word + c) * kCodesPerLane, j, x);
      }
    }
  }

  // 16-bit lanes of two rows of 32 bytes, alternating.
  static __m512i interleave(__m512i two) {
    alignas(64) static constexpr short kIndex[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kIndex), two);
  }

  // INT4 values of two tokens from a byte of the row: sink(j, vector j), j = 0..3.
  template <class Sink>
  static void value_codes(const Rows& rows, int64_t token, int64_t offset, Sink sink) {
    const __m512i halves = interleave(two_pieces(rows, token, token + 1, offset)), table = code_values();
#pragma GCC unroll 8
    for (int j = 0; j < kCodesPerLane; ++j) sink(j, codes(halves, j, table));
  }

  // bfloat16 values of two tokens.
  static void value_halves(const Shape& shape, const Rows& rows, int64_t token, Unit* out, float* scales) {
    for (int64_t n = 0; n < shape.value_vectors; ++n) {
      _mm512_storeu_si512(out + n * kLanes, interleave(two_pieces(rows, token, token + 1, n * kPieceBytes)));
    }
    drop_nonfinite(shape, out, scales);
  }

  // A weight of zero times an infinity is NaN, and would reach queries that do not see the token. So a value row that
  // is not finite becomes zeros with a NaN scale, which only weights that are seen are multiplied with.
  static void drop_nonfinite(const Shape& shape, Unit* pair, float* scales) {
    constexpr uint32_t kHalf[2] = {0x0000ffffu, 0xffff0000u};
    for (int i = 0; i < 2; ++i) {
      bool found = false;
      const __m512i half = _mm512_set1_epi32(static_cast<int>(kHalf[i]));
      for (int64_t n = 0; n < shape.value_vectors; ++n) {
        found = found || has_nonfinite(_mm512_and_si512(_mm512_loadu_si512(pair + n * kLanes), half));
      }
      if (!found) continue;
      scales[i] = std::numeric_limits<float>::quiet_NaN();
      for (int64_t n = 0; n < shape.value_vectors; ++n) {
        const __m512i both = _mm512_loadu_si512(pair + n * kLanes);
        _mm512_storeu_si512(pair + n * kLanes, _mm512_andnot_si512(half, both));
      }
    }
  }

  // q (zero-padded) to pairs in the order of K; a float query's second term is what the first leaves over.
  static void pack_query(const Shape& shape, const float* q, Unit* out) {
    // Within 8 elements: 0 4 1 5 2 6 3 7, as INT4 words decode.
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    for (int64_t term = 0; term < shape.query_terms; ++term) {
      for (int64_t unit = 0; unit < shape.key_depth; unit += kLanes) {
        F x[2];
        for (int i = 0; i < 2; ++i) {
          x[i] = load(q + 2 * unit + i * kLanes);
          if (term == 1) x[i] = _mm512_sub_ps(x[i], rounded(x[i]));
        }
        __m512i packed = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[1], x[0]));
        if (shape.int4()) packed = _mm512_shuffle_epi8(packed, order);
        _mm512_storeu_si512(out + term * shape.key_depth + unit, packed);
      }
    }
  }

  static F rounded(F x) {
    const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
};

}  // namespace

void items(const Problem& p, const Plan& plan, int64_t first, int64_t last) { Flash<Isa>::run(p, plan, first, last); }

}  // namespace tilewright::int4_fp8_attention::avx512_bf16
