// SPDX-License-Identifier: Apache-2.0
#include <bit>

#include "microbench/avx512.h"

namespace tilewright::microbench::avx512_bf16 {
namespace {

uint64_t bf16(int64_t rounds) {
  __m512 acc[kChains] = {};
  keep_apart(acc);
  __m512i weights = _mm512_set1_epi16(0x3f80), x = _mm512_set1_epi16(0x3f00);
  for (int64_t r = 0; r < rounds; ++r) {
    __asm__ volatile("" : "+v"(weights), "+v"(x));
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      acc[c] = _mm512_dpbf16_ps(acc[c], std::bit_cast<__m512bh>(weights), std::bit_cast<__m512bh>(x));
    }
  }
  for (int c = 1; c < kChains; ++c) acc[0] = _mm512_add_ps(acc[0], acc[c]);
  return static_cast<uint64_t>(_mm512_reduce_add_ps(acc[0]));
}

}  // namespace

const Loops loops{read, int8, bf16, floating, 128 * kChains, 64 * kChains, 32 * kChains};

}  // namespace tilewright::microbench::avx512_bf16
