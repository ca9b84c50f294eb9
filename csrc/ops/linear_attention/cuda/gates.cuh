// SPDX-License-Identifier: Apache-2.0
// Gates of a chunk: running sums of log decays.
#pragma once

#include "hopper/hopper.h"
#include "ops/linear_attention/cuda/problem.h"

namespace tilewright::linear_attention::cuda {

inline constexpr float kLog2E = 1.44269504088896340736f;

// 2^-160 is 0 in float32, so lower logarithms mean the same. Sums of 64 of them stay small enough that the tokens after
// one that forgets everything keep their decays to 2^-10: half an ulp of 64 * 160 is 2^-11.
inline constexpr float kLowestLog2 = -160.0f;

// g in units of log 2; NaN stays.
TILEWRIGHT_DEVICE float bounded_log2(float g) {
  const float x = g * kLog2E;
  return x < kLowestLog2 ? kLowestLog2 : x;
}

struct ChunkGates {
  float sum[kChunk];  // of log2 decays, up to and with each token
  float beta[kChunk];  // 1 for the additive rule; 0 behind the sequence's end
};

// Of one warp, lane l has the tokens 2l and 2l + 1 of a chunk. Behind the sequence's end g and beta are 0.
struct TokenGates {
  float g[2], beta[2];
};

template <bool kDelta, class In>
TILEWRIGHT_DEVICE TokenGates fetch_gates(const Problem<In, float>& p, int64_t batch, int64_t first, int rows,
                                         int64_t head) {
  TokenGates gates{};
  const int token = 2 * (static_cast<int>(threadIdx.x) % 32);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (token + i >= rows) continue;
    if (p.decay != Decay::kNone) gates.g[i] = p.g.row(batch, first + token + i, head)[0];
    gates.beta[i] = kDelta ? p.beta.row(batch, first + token + i, head)[0] : 1.0f;
  }
  return gates;
}

// Running sums of log2 decays for a lane's tokens, and that of the whole chunk.
TILEWRIGHT_DEVICE float sum_gates(const TokenGates& gates, float (&sums)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float g[2] = {bounded_log2(gates.g[0]), bounded_log2(gates.g[1])};
  float sum = g[0] + g[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += before;
  }
  const float before = __shfl_up_sync(0xffffffffu, sum, 1);
  sums[0] = (lane == 0 ? 0.0f : before) + g[0];
  sums[1] = sums[0] + g[1];
  return __shfl_sync(0xffffffffu, sums[1], 31);
}

}  // namespace tilewright::linear_attention::cuda
