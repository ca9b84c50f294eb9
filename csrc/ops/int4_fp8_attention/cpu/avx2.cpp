// SPDX-License-Identifier: Apache-2.0
// AVX2 and FMA: panels of floats, everything in float.
#include <immintrin.h>

#include "ops/int4_fp8_attention/cpu/append.h"
#include "ops/int4_fp8_attention/cpu/flash.h"
#include "ops/int4_fp8_attention/kernels.h"

namespace tilewright::int4_fp8_attention::avx2 {
namespace {

struct Isa {
  static constexpr int64_t kLanes = 8;
  static constexpr int64_t kRows = 6;    // 6 x 2 accumulators, 2 vectors of the panel and a broadcast: 16 registers
  static constexpr int64_t kCols = 2;
  static constexpr int64_t kDepthPerUnit = 1;
  static constexpr int64_t kDirectRows = 3;  // more would not fit into 16 registers
  using F = __m256;
  using U = __m256;
  using Unit = float;
  using Mask = __m256;

  static F load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* out, F x) { _mm256_storeu_ps(out, x); }
  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F select(Mask mask, F x, F otherwise) { return _mm256_blendv_ps(otherwise, x, mask); }
  static void store_units(Unit* out, U x) { store(out, x); }
  static U load_units(const Unit* x) { return load(x); }
  static U broadcast_unit(const Unit* x) { return _mm256_broadcast_ss(x); }
  static F dot(F sum, U a, U b) { return fma(a, b, sum); }
  static void store_weights(Unit* out, const F (&weights)[kDepthPerUnit]) { store(out, weights[0]); }

  static float reduce_max(F x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static float reduce_add(F x) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
  }

  // Lanes [first, last), clipped.
  static Mask range(int64_t first, int64_t last) {
    const auto clip = [](int64_t n) { return _mm256_set1_epi32(static_cast<int>(std::clamp<int64_t>(n, 0, kLanes))); };
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(
        _mm256_andnot_si256(_mm256_cmpgt_epi32(clip(first), lane), _mm256_cmpgt_epi32(clip(last), lane)));
  }

  // 2^x for x <= 0, see avx512.h; below 2^-126 the result is 0.
  static F exp2(F x) {
    const F lowest = set1(-126.0f);
    const F clamped = _mm256_max_ps(lowest, x);   // NaN passes: the second operand is returned
    const F whole = _mm256_floor_ps(clamped);
    const F f = _mm256_sub_ps(clamped, whole);
    F y = set1(0x1.e974fap-10f);
    y = fma(y, f, set1(0x1.277856p-7f));
    y = fma(y, f, set1(0x1.c91ce6p-5f));
    y = fma(y, f, set1(0x1.ebdb56p-3f));
    y = fma(y, f, set1(0x1.62e4bap-1f));
    y = fma(y, f, set1(1.0f));
    constexpr int kMantissaBits = 23, kBias = 127;
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(kBias));
    const F power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, kMantissaBits));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, lowest, _CMP_LT_OQ), mul(y, power));
  }

  static float exp2_of(float x) { return _mm256_cvtss_f32(exp2(set1(x))); }

  static void load_scales(const uint8_t* source, int64_t stride, format::ScaleType type, int64_t tokens, float* out) {
    for (int64_t t = 0; t < tokens; ++t) out[t] = format::load_scale(source + t * stride, 0, type);
  }

  static constexpr int64_t kPieceBytes = 16;  // of V

  // At most sizeof(Bytes) bytes of a row from an offset; zeros past its end.
  template <class Bytes>
  static Bytes piece(const uint8_t* row, int64_t offset, int64_t row_bytes) {
    constexpr auto kBytes = static_cast<int64_t>(sizeof(Bytes));
    alignas(Bytes) uint8_t tail[kBytes] = {};
    const uint8_t* source = row + offset;
    if (row_bytes - offset < kBytes) {
      std::memcpy(tail, source, static_cast<size_t>(std::max<int64_t>(0, row_bytes - offset)));
      source = tail;
    }
    Bytes bytes;
    std::memcpy(&bytes, source, sizeof(Bytes));
    return bytes;
  }

  // Eight 4-byte words of 8 rows from a token, transposed: lane t of out[c] is word first_word + c of row token + t.
  static void transpose_words(const Rows& rows, int64_t token, int64_t first_word, __m256i (&out)[8]) {
    __m256i r[8], pairs[8], quads[8];
    for (int i = 0; i < 8; ++i) r[i] = piece<__m256i>(rows[token + i], 4 * first_word, rows.bytes);
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int half = 0; half < 8; half += 4) {
      quads[half] = _mm256_unpacklo_epi64(pairs[half], pairs[half + 2]);
      quads[half + 1] = _mm256_unpackhi_epi64(pairs[half], pairs[half + 2]);
      quads[half + 2] = _mm256_unpacklo_epi64(pairs[half + 1], pairs[half + 3]);
      quads[half + 3] = _mm256_unpackhi_epi64(pairs[half + 1], pairs[half + 3]);
    }
    for (int c = 0; c < 4; ++c) {
      out[c] = _mm256_permute2x128_si256(quads[c], quads[4 + c], 0x20);
      out[4 + c] = _mm256_permute2x128_si256(quads[c], quads[4 + c], 0x31);
    }
  }

  static U codes(__m256i lanes, int j) {
    const __m256i low = _mm256_set1_epi32(format::Int4::kMaxCode), zero = _mm256_set1_epi32(format::Int4Kv::kZero);
    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(lanes, j * format::Int4Kv::kBitsPerCode), low);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero));
  }

  // sink(first, j, keys), for unit first + j, for the units of eight words or of those that are left; keys[s] are those
  // of 8 tokens from token + 8 s.
  template <int kSteps, class Sink>
  static void keys(const Shape& shape, const Rows& rows, int64_t token, int64_t first_word, Sink sink) {
    constexpr int kCodes = 8;
    __m256i words[kSteps][kWordsPerStep];
    for (int s = 0; s < kSteps; ++s) transpose_words(rows, token + s * kLanes, first_word, words[s]);
    const int64_t count = std::min(kWordsPerStep, shape.words - first_word);
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    for (int64_t c = 0; c < count; ++c) {
      U x[kSteps];
      if (!shape.int4()) {
        for (int s = 0; s < kSteps; ++s) x[s] = _mm256_castsi256_ps(_mm256_slli_epi32(words[s][c], 16));
        sink((first_word + c) * 2, 0, x);
        for (int s = 0; s < kSteps; ++s) x[s] = _mm256_castsi256_ps(_mm256_and_si256(words[s][c], upper));
        sink((first_word + c) * 2, 1, x);
        continue;
      }
#pragma GCC unroll 8
      for (int j = 0; j < kCodes; ++j) {
        for (int s = 0; s < kSteps; ++s) x[s] = codes(words[s][c], j);
        sink((first_word + c) * kCodes, j, x);
      }
    }
  }

  // 16-bit lanes of 16 bytes of a row, widened.
  static __m256i lanes_of(const Rows& rows, int64_t token, int64_t offset) {
    return _mm256_cvtepu16_epi32(piece<__m128i>(rows[token], offset, rows.bytes));
  }

  // INT4 values of one token from a byte of the row: sink(j, vector j), j = 0..3.
  template <class Sink>
  static void value_codes(const Rows& rows, int64_t token, int64_t offset, Sink sink) {
    const __m256i lanes = lanes_of(rows, token, offset);
#pragma GCC unroll 8
    for (int j = 0; j < kCodesPerLane; ++j) sink(j, codes(lanes, j));
  }

  // bfloat16 values of one token. A weight of zero times an infinity is NaN, and would reach queries that do not see
  // the token. So a row that is not finite becomes zeros with a NaN scale, which only weights that are seen are
  // multiplied with.
  static void value_halves(const Shape& shape, const Rows& rows, int64_t token, Unit* out, float* scale) {
    const __m256i infinity = _mm256_set1_epi32(0x7f800000);
    bool finite = true;
    for (int64_t n = 0; n < shape.value_vectors; ++n) {
      const __m256i bits = _mm256_slli_epi32(lanes_of(rows, token, n * kPieceBytes), 16);
      const __m256i nonfinite = _mm256_cmpeq_epi32(_mm256_and_si256(bits, infinity), infinity);
      finite = finite && _mm256_movemask_epi8(nonfinite) == 0;
      store(out + n * kLanes, _mm256_castsi256_ps(bits));
    }
    if (finite) return;
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::fill(out, out + shape.value_vectors * kLanes, 0.0f);
  }

  static void pack_query(const Shape& shape, const float* q, Unit* out) {
    for (int64_t unit = 0; unit < shape.key_depth; unit += kLanes) store(out + unit, load(q + unit));
  }

  // out[d] = sums of d times factor, from the order of V (see shape.h) to the order of elements.
  static void write_row(const Shape& shape, const float* sums, float factor, float* out) {
    if (!shape.int4()) {
      for (int64_t d = 0; d < shape.head_dim; ++d) out[d] = sums[d] * factor;
      return;
    }
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      const int64_t lane = d / 4;
      out[d] = sums[(lane / kLanes * 4 + d % 4) * kLanes + lane % kLanes] * factor;
    }
  }
};

}  // namespace

void items(const Problem& p, const Plan& plan, int64_t first, int64_t last) { Flash<Isa>::run(p, plan, first, last); }

void append(const Append& a, int64_t first, int64_t last) { Appender<Isa>::run(a, first, last); }

}  // namespace tilewright::int4_fp8_attention::avx2
