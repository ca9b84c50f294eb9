// SPDX-License-Identifier: Apache-2.0
// Gates of a chunk: running sums of log decays, and the factors that tokens read and write the state with.
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

// By one warp: lane l takes the tokens 2l and 2l + 1. factors: three rows of kChunk, see prepared.h.
template <bool kDelta, class In>
TILEWRIGHT_DEVICE void load_gates(const Problem<In, float>& p, const Chunk& chunk, int64_t head, ChunkGates& gates,
                                  float* factors) {
  const int lane = static_cast<int>(threadIdx.x) % 32, token = 2 * lane;
  float g[2] = {0.0f, 0.0f}, beta[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (token + i >= chunk.rows) continue;
    const int64_t t = chunk.first + token + i;
    if (p.decay != Decay::kNone) g[i] = bounded_log2(p.g.row(chunk.batch, t, head)[0]);
    beta[i] = kDelta ? p.beta.row(chunk.batch, t, head)[0] : 1.0f;
  }
  float sum = g[0] + g[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += before;
  }
  const float before = __shfl_up_sync(0xffffffffu, sum, 1);
  float sums[2];
  sums[0] = (lane == 0 ? 0.0f : before) + g[0];
  sums[1] = sums[0] + g[1];
  const float all = __shfl_sync(0xffffffffu, sums[1], 31);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    gates.sum[token + i] = sums[i];
    gates.beta[token + i] = beta[i];
    const float into = exp2f(sums[i]);
    factors[token + i] = into;
    factors[kChunk + token + i] = p.scale * into;
    factors[2 * kChunk + token + i] = beta[i] * exp2f(all - sums[i]);
  }
}

}  // namespace tilewright::linear_attention::cuda
