// SPDX-License-Identifier: Apache-2.0
// AVX-512 without the bfloat16 dot product: panels of floats, everything in float.
#include "ops/int4_fp8_attention/cpu/avx512.h"

#include "ops/int4_fp8_attention/cpu/append.h"
#include "ops/int4_fp8_attention/cpu/flash.h"
#include "ops/int4_fp8_attention/kernels.h"

namespace tilewright::int4_fp8_attention::avx512 {
namespace {

struct Isa : Avx512 {
  static constexpr int64_t kDepthPerUnit = 1;
  using Unit = float;
  using U = __m512;

  static void store_units(Unit* out, U x) { store(out, x); }
  static U load_units(const Unit* x) { return load(x); }
  static U broadcast_unit(const Unit* x) { return set1(*x); }
  static F dot(F sum, U a, U b) { return fma(a, b, sum); }
  static void store_weights(Unit* out, const F (&weights)[kDepthPerUnit]) { store(out, weights[0]); }

  static __m512 code_values() {
    return _mm512_setr_ps(-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f, 0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f,
                          6.0f, 7.0f);
  }

  // The lookup reads four bits of an index.
  static U codes(__m512i lanes, int j, __m512 table) {
    const auto shift = static_cast<unsigned>(j * format::Int4Kv::kBitsPerCode);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, shift), table);
  }

  // sink(first, j, keys), for unit first + j, for the units of eight words or of those that are left; keys[s] are those
  // of 16 tokens from token + 16 s.
  template <int kSteps, class Sink>
  static void keys(const Shape& shape, const Rows& rows, int64_t token, int64_t first_word, Sink sink) {
    constexpr int kCodes = 8;
    __m512i words[kSteps][kWordsPerStep];
    for (int s = 0; s < kSteps; ++s) transpose_words(rows, token + s * kLanes, first_word, words[s]);
    const int64_t count = std::min(kWordsPerStep, shape.words - first_word);
    const __m512 table = code_values();
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int64_t c = 0; c < count; ++c) {
      U x[kSteps];
      if (!shape.int4()) {
        for (int s = 0; s < kSteps; ++s) x[s] = _mm512_castsi512_ps(_mm512_slli_epi32(words[s][c], 16));
        sink((first_word + c) * 2, 0, x);
        for (int s = 0; s < kSteps; ++s) x[s] = _mm512_castsi512_ps(_mm512_and_si512(words[s][c], upper));
        sink((first_word + c) * 2, 1, x);
        continue;
      }
#pragma GCC unroll 8
      for (int j = 0; j < kCodes; ++j) {
#pragma GCC unroll 8
        for (int s = 0; s < kSteps; ++s) x[s] = codes(words[s][c], j, table);
        sink((first_word + c) * kCodes, j, x);
      }
    }
  }

  // INT4 values of one token from a byte of the row: sink(j, vector j), j = 0..3.
  template <class Sink>
  static void value_codes(const Rows& rows, int64_t token, int64_t offset, Sink sink) {
    const __m512i lanes = _mm512_cvtepu16_epi32(piece(rows[token], offset, rows.bytes));
    const __m512 table = code_values();
#pragma GCC unroll 8
    for (int j = 0; j < kCodesPerLane; ++j) sink(j, codes(lanes, j, table));
  }

  // bfloat16 values of one token. A weight of zero times an infinity is NaN, and would reach queries that do not see
  // the token. So a row that is not finite becomes zeros with a NaN scale, which only weights that are seen are
  // multiplied with.
  static void value_halves(const Shape& shape, const Rows& rows, int64_t token, Unit* out, float* scale) {
    bool finite = true;
    for (int64_t n = 0; n < shape.value_vectors; ++n) {
      const __m256i halves = piece(rows[token], n * kPieceBytes, rows.bytes);
      finite = finite && !has_nonfinite(_mm512_zextsi256_si512(halves));
      store(out + n * kLanes, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
    }
    if (finite) return;
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::fill(out, out + shape.value_vectors * kLanes, 0.0f);
  }

  static void pack_query(const Shape& shape, const float* q, Unit* out) {
    for (int64_t unit = 0; unit < shape.key_depth; unit += kLanes) store(out + unit, load(q + unit));
  }
};

}  // namespace

void items(const Problem& p, const Plan& plan, int64_t first, int64_t last) { Flash<Isa>::run(p, plan, first, last); }

void append(const Append& a, int64_t first, int64_t last) { Appender<Isa>::run(a, first, last); }

}  // namespace tilewright::int4_fp8_attention::avx512
