// SPDX-License-Identifier: Apache-2.0
// One vector vocabulary for float and double at every level: a kernel is written once over Simd<T>, and each level's
// file compiles it for its registers. In an unnamed namespace for the reason given in vec_avx512.h.
//
// Results of different levels differ by rounding (lanes are summed in other orders, the generic level does not fuse).
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tilewright {
namespace {

template <class T>
struct Simd;

#if defined(__AVX512F__)

template <>
struct Simd<float> {
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static void store_first(float* p, V v, int64_t n) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(V a) { return _mm512_reduce_add_ps(a); }
  // yes where a < b, no elsewhere and where either is NaN.
  static V select_less(V a, V b, V yes, V no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  // p * 2^n for integral n.
  static V scale_by_power(V p, V n) { return _mm512_scalef_ps(p, n); }
  static V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // to = from^T for a square of kLanes rows: pairs, quads, then quarters of the registers change places.
  static void transpose_square(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
    V r[16], s[16];
    for (int i = 0; i < 16; ++i) r[i] = load(from + i * ld_from);
    for (int i = 0; i < 16; i += 2) {
      s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(s[i + j]), _mm512_castps_pd(s[i + j + 2])));
        r[i + 2 * j + 1] =
            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(s[i + j]), _mm512_castps_pd(s[i + j + 2])));
      }
    }
    for (int i = 0; i < 4; ++i) {
      const V low = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), high = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      const V low2 = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      const V high2 = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
      store(to + i * ld_to, _mm512_shuffle_f32x4(low, low2, 0x88));
      store(to + (i + 4) * ld_to, _mm512_shuffle_f32x4(high, high2, 0x88));
      store(to + (i + 8) * ld_to, _mm512_shuffle_f32x4(low, low2, 0xdd));
      store(to + (i + 12) * ld_to, _mm512_shuffle_f32x4(high, high2, 0xdd));
    }
  }

 private:
  static __mmask16 mask(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u); }
};

template <>
struct Simd<double> {
  using V = __m512d;
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 32;
  static V zero() { return _mm512_setzero_pd(); }
  static V set1(double x) { return _mm512_set1_pd(x); }
  static V load(const double* p) { return _mm512_loadu_pd(p); }
  static V load_first(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(mask(n), p); }
  static void store(double* p, V v) { _mm512_storeu_pd(p, v); }
  static void store_first(double* p, V v, int64_t n) { _mm512_mask_storeu_pd(p, mask(n), v); }
  static V add(V a, V b) { return _mm512_add_pd(a, b); }
  static V sub(V a, V b) { return _mm512_sub_pd(a, b); }
  static V mul(V a, V b) { return _mm512_mul_pd(a, b); }
  static V div(V a, V b) { return _mm512_div_pd(a, b); }
  static V max(V a, V b) { return _mm512_max_pd(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static double sum(V a) { return _mm512_reduce_add_pd(a); }
  static V select_less(V a, V b, V yes, V no) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), no, yes);
  }

 private:
  static __mmask8 mask(int64_t n) { return static_cast<__mmask8>(n >= 8 ? 0xffu : (1u << n) - 1u); }
};

#elif defined(__AVX2__)

template <>
struct Simd<float> {
  using V = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, mask(n)); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store_first(float* p, V v, int64_t n) { _mm256_maskstore_ps(p, mask(n), v); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(V a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static V select_less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V scale_by_power(V p, V n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static void transpose_square(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
    V r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = load(from + i * ld_from);
    for (int i = 0; i < 8; i += 2) {
      s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0x44);
        r[i + 2 * j + 1] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0xee);
      }
    }
    for (int i = 0; i < 4; ++i) {
      store(to + i * ld_to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      store(to + (i + 4) * ld_to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }

 private:
  static __m256i mask(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n > 8 ? 8 : n)), lane);
  }
};

template <>
struct Simd<double> {
  using V = __m256d;
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;
  static V zero() { return _mm256_setzero_pd(); }
  static V set1(double x) { return _mm256_set1_pd(x); }
  static V load(const double* p) { return _mm256_loadu_pd(p); }
  static V load_first(const double* p, int64_t n) { return _mm256_maskload_pd(p, mask(n)); }
  static void store(double* p, V v) { _mm256_storeu_pd(p, v); }
  static void store_first(double* p, V v, int64_t n) { _mm256_maskstore_pd(p, mask(n), v); }
  static V add(V a, V b) { return _mm256_add_pd(a, b); }
  static V sub(V a, V b) { return _mm256_sub_pd(a, b); }
  static V mul(V a, V b) { return _mm256_mul_pd(a, b); }
  static V div(V a, V b) { return _mm256_div_pd(a, b); }
  static V max(V a, V b) { return _mm256_max_pd(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static double sum(V a) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  static V select_less(V a, V b, V yes, V no) { return _mm256_blendv_pd(no, yes, _mm256_cmp_pd(a, b, _CMP_LT_OQ)); }

 private:
  static __m256i mask(int64_t n) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n > 4 ? 4 : n), lane);
  }
};

#else

// Sixteen bytes in the compiler's own vector type: every processor has them.
template <class T, class Int, int N>
struct GenericSimd {
  typedef T V __attribute__((vector_size(16)));
  typedef Int I __attribute__((vector_size(16)));
  static constexpr int kLanes = N;
  static constexpr int kRegisters = 16;
  static V zero() { return V{}; }
  static V set1(T x) { return x - V{}; }
  static V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static V load_first(const T* p, int64_t n) {
    V v = {};
    std::memcpy(&v, p, static_cast<size_t>(n > N ? N : n) * sizeof(T));
    return v;
  }
  static void store(T* p, V v) { std::memcpy(p, &v, sizeof(v)); }
  static void store_first(T* p, V v, int64_t n) { std::memcpy(p, &v, static_cast<size_t>(n > N ? N : n) * sizeof(T)); }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V max(V a, V b) { return a > b ? a : b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static T sum(V a) {
    T total = a[0];
    for (int i = 1; i < N; ++i) total += a[i];
    return total;
  }
  static V select_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
};

template <>
struct Simd<float> : GenericSimd<float, int32_t, 4> {
  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits.
  static V round(V a) { return (a + 0x1.8p23f) - 0x1.8p23f; }
  static V scale_by_power(V p, V n) {
    I exponent = __builtin_convertvector(n, I);
    exponent = (exponent + 127) << 23;
    V power;
    std::memcpy(&power, &exponent, sizeof(power));
    return p * power;
  }
};

template <>
struct Simd<double> : GenericSimd<double, int64_t, 2> {};

#endif

// e^x. float: within 2 units in the last place for x in [-87, 88]; 0 below that, e^88 above. NaN stays NaN.
inline Simd<float>::V exp(Simd<float>::V value) {
  using S = Simd<float>;
  const S::V lowest = S::set1(-87.0f);
  S::V x = S::select_less(value, lowest, lowest, value);
  x = S::select_less(S::set1(88.0f), x, S::set1(88.0f), x);
  const S::V n = S::round(S::mul(x, S::set1(0x1.715476p+0f)));
  // ln 2 in two parts, the first short enough that n * part is exact.
  S::V r = S::sub(x, S::mul(n, S::set1(0x1.62ep-1f)));
  r = S::sub(r, S::mul(n, S::set1(0x1.0bfbe8p-15f)));
  S::V p = S::fma(r, S::set1(0x1.a01a02p-13f), S::set1(0x1.6c16c2p-10f));
  p = S::fma(p, r, S::set1(0x1.111112p-7f));
  p = S::fma(p, r, S::set1(0x1.555556p-5f));
  p = S::fma(p, r, S::set1(0x1.555556p-3f));
  p = S::fma(p, r, S::set1(0.5f));
  p = S::fma(S::mul(p, r), r, S::add(r, S::set1(1.0f)));
  return S::select_less(value, lowest, S::zero(), S::scale_by_power(p, n));
}

// Double precision serves gradient checks: the library's function, lane by lane.
inline Simd<double>::V exp(Simd<double>::V value) {
  double lane[Simd<double>::kLanes];
  Simd<double>::store(lane, value);
  for (double& x : lane) x = std::exp(x);
  return Simd<double>::load(lane);
}

}  // namespace
}  // namespace tilewright
