// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "microbench/microbench.h"

namespace tilewright::microbench::generic {
namespace {

constexpr int kChains = 8;

uint64_t read(const uint8_t* buffer, int64_t bytes) {
  uint64_t sum[4] = {};
  for (int64_t i = 0; i + 32 <= bytes; i += 32) {
    uint64_t words[4];
    std::memcpy(words, buffer + i, sizeof(words));
    for (int j = 0; j < 4; ++j) sum[j] += words[j];
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

uint64_t integer(int64_t rounds) {
  uint32_t acc[kChains] = {1, 2, 3, 4, 5, 6, 7, 8};
  for (int64_t r = 0; r < rounds; ++r) {
    for (uint32_t& a : acc) a += a * static_cast<uint32_t>(r);
  }
  uint64_t sum = 0;
  for (uint32_t a : acc) sum += a;
  return sum;
}

uint64_t floating(int64_t rounds) {
  float acc[kChains] = {};
  for (int64_t r = 0; r < rounds; ++r) {
    for (float& a : acc) a = a * 0.999f + 1.0f;
  }
  float sum = 0.0f;
  for (float a : acc) sum += a;
  return static_cast<uint64_t>(sum);
}

}  // namespace

const Loops loops{read, integer, floating, floating, 2 * kChains, 2 * kChains, 2 * kChains};

}  // namespace tilewright::microbench::generic
