// SPDX-License-Identifier: Apache-2.0
// AVX-512 without the bfloat16 dot product: panels of floats, everything in float.
#include "ops/int4_fp8_attention/cpu/append.h"
#include "ops/int4_fp8_attention/cpu/avx512.h"
#include "ops/int4_fp8_attention/cpu/flash.h"
#include "ops/int4_fp8_attention/kernels.h"

namespace tilewright::int4_fp8_attention::avx512 {
namespace {

struct Isa : Avx512 {
  static constexpr int64_t kDepthPerUnit = 1;
  using Unit = float;
  using U = __m512;

  static U load_units(const Unit* x) { return load(x); }
  static U broadcast_unit(const Unit* x) { return set1(*x); }
  static F dot(F sum, U a, U b) { return fma(a, b, sum); }
  static void store_weights(Unit* out, const F (&weights)[kDepthPerUnit]) { store(out, weights[0]); }

  static __m512 code_values() {
    return _mm512_setr_ps(-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f, 0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f,
                          6.0f, 7.0f);
  }

  // The first kCodes codes of every lane, one vector each; the lookup reads four bits of an index.
  template <int kCodes>
  static void store_codes(__m512i codes, __m512 table, Unit* out, int64_t stride) {
    for (int j = 0; j < kCodes; ++j) {
      store(out + j * stride, _mm512_permutexvar_ps(codes, table));
      codes = _mm512_srli_epi32(codes, format::Int4Kv::kBitsPerCode);
    }
  }

  static void keys(const Shape& shape, const uint8_t* const (&rows)[kTokensPerStep], Unit* out) {
    if (shape.int4()) {
      const __m512 table = code_values();
      transpose_keys(shape, rows, out, [&](__m512i word, Unit* to) { store_codes<8>(word, table, to, kKeysPerTile); });
      return;
    }
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    transpose_keys(shape, rows, out, [&](__m512i word, Unit* to) {
      store(to, _mm512_castsi512_ps(_mm512_slli_epi32(word, 16)));
      store(to + kKeysPerTile, _mm512_castsi512_ps(_mm512_and_si512(word, upper)));
    });
  }

  static void values(const Shape& shape, const uint8_t* const (&rows)[kTokensPerStep], Unit* out, float* scales) {
    constexpr int64_t kBytes = 32;
    const __m512 table = code_values();
    for (int64_t t = 0; t < kTokensPerStep; ++t, out += shape.value_vectors * kLanes) {
      bool finite = true;
      for (int64_t at = 0; at < shape.row_bytes; at += kBytes) {
        const __m256i halves = piece(rows[t], at, shape.row_bytes);
        const __m512i lanes = _mm512_cvtepu16_epi32(halves);
        if (shape.int4()) {
          store_codes<4>(lanes, table, out + at / kBytes * 4 * kLanes, kLanes);
        } else {
          finite = finite && !has_nonfinite(_mm512_zextsi256_si512(halves));
          store(out + at / kBytes * kLanes, _mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16)));
        }
      }
      // A weight of zero times an infinity is NaN: only weights that are seen are multiplied with the scale.
      if (finite) continue;
      scales[t] = std::numeric_limits<float>::quiet_NaN();
      std::fill(out, out + shape.value_vectors * kLanes, 0.0f);
    }
  }

  static void pack_query(const Shape& shape, const float* q, Unit* out) {
    for (int64_t unit = 0; unit < shape.key_depth; unit += kLanes) store(out + unit, load(q + unit));
  }
};

}  // namespace

void items(const Problem& p, const Plan& plan, int64_t first, int64_t last) { Flash<Isa>::run(p, plan, first, last); }

void append(const Append& a, int64_t first, int64_t last) { Appender<Isa>::run(a, first, last); }

}  // namespace tilewright::int4_fp8_attention::avx512
