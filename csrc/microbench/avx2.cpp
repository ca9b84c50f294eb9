// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "microbench/microbench.h"

namespace tilewright::microbench::avx2 {
namespace {

constexpr int kChains = 12;

// Chains that start alike would be computed once.
template <class Vector>
void keep_apart(Vector (&acc)[kChains]) {
  for (Vector& a : acc) __asm__ volatile("" : "+x"(a));
}

uint64_t read(const uint8_t* buffer, int64_t bytes) {
  __m256i sum[4] = {};
  for (int64_t i = 0; i + 128 <= bytes; i += 128) {
    for (int j = 0; j < 4; ++j) {
      const auto* at = reinterpret_cast<const __m256i*>(buffer + i + 32 * j);
      sum[j] = _mm256_xor_si256(sum[j], _mm256_loadu_si256(at));
    }
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(all, 0));
}

// vpmaddubsw, vpmaddwd and an addition: 32 products.
uint64_t integer(int64_t rounds) {
  __m256i acc[kChains] = {};
  keep_apart(acc);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i weights = _mm256_set1_epi8(3);
  for (int64_t r = 0; r < rounds; ++r) {
    __asm__ volatile("" : "+x"(weights));
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      const __m256i products = _mm256_maddubs_epi16(weights, acc[c]);
      acc[c] = _mm256_add_epi32(acc[c], _mm256_madd_epi16(products, ones));
    }
  }
  for (int c = 1; c < kChains; ++c) acc[0] = _mm256_xor_si256(acc[0], acc[c]);
  return static_cast<uint64_t>(_mm256_extract_epi64(acc[0], 0));
}

uint64_t floating(int64_t rounds) {
  __m256 acc[kChains] = {};
  keep_apart(acc);
  __m256 factor = _mm256_set1_ps(0.999f);
  for (int64_t r = 0; r < rounds; ++r) {
    __asm__ volatile("" : "+x"(factor));
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) acc[c] = _mm256_fmadd_ps(acc[c], factor, factor);
  }
  for (int c = 1; c < kChains; ++c) acc[0] = _mm256_add_ps(acc[0], acc[c]);
  return static_cast<uint64_t>(_mm256_cvtss_f32(acc[0]));
}

}  // namespace

const Loops loops{read, integer, floating, floating, 64 * kChains, 16 * kChains, 16 * kChains};

}  // namespace tilewright::microbench::avx2
