// SPDX-License-Identifier: Apache-2.0
// Loops of the AVX-512 levels; a private copy for each file that includes them.
#pragma once

#include <immintrin.h>

#include "microbench/microbench.h"

namespace tilewright::microbench {
namespace {

constexpr int kChains = 16;

// Chains that start alike would be computed once.
template <class Vector>
void keep_apart(Vector (&acc)[kChains]) {
  for (Vector& a : acc) __asm__ volatile("" : "+v"(a));
}

uint64_t read(const uint8_t* buffer, int64_t bytes) {
  __m512i sum[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int j = 0; j < 4; ++j) sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(buffer + i + 64 * j));
  }
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(all));
}

uint64_t int8(int64_t rounds) {
  __m512i acc[kChains] = {};
  keep_apart(acc);
  __m512i weights = _mm512_set1_epi8(3), x = _mm512_set1_epi8(-5);
  for (int64_t r = 0; r < rounds; ++r) {
    __asm__ volatile("" : "+v"(weights), "+v"(x));
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = _mm512_dpbusd_epi32(acc[c], weights, x);
  }
  for (int c = 1; c < kChains; ++c) acc[0] = _mm512_add_epi32(acc[0], acc[c]);
  return static_cast<uint64_t>(_mm512_reduce_add_epi32(acc[0]));
}

uint64_t floating(int64_t rounds) {
  __m512 acc[kChains] = {};
  keep_apart(acc);
  __m512 factor = _mm512_set1_ps(0.999f);
  for (int64_t r = 0; r < rounds; ++r) {
    __asm__ volatile("" : "+v"(factor));
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = _mm512_fmadd_ps(acc[c], factor, factor);
  }
  for (int c = 1; c < kChains; ++c) acc[0] = _mm512_add_ps(acc[0], acc[c]);
  return static_cast<uint64_t>(_mm512_reduce_add_ps(acc[0]));
}

}  // namespace
}  // namespace tilewright::microbench
