// SPDX-License-Identifier: Apache-2.0
// One thread a pair of channels.
#include "core/memory.h"
#include "hopper/hopper.h"
#include "ops/rope/cuda/launch.h"

namespace tilewright::rope {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) rotate_kernel(const __grid_constant__ CudaRotation p) {
  const int64_t half = p.head_dim / 2;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int64_t>(threadIdx.x);
  if (i >= p.tokens * p.heads * half) return;
  const int64_t pair = i % half, head = i / half % p.heads, token = i / half / p.heads;
  const float cosine = p.angles[token * 2 * half + pair], sine = p.angles[token * 2 * half + half + pair];
  float* const row = p.x + (token * p.heads + head) * p.head_dim;
  const float low = row[pair], high = row[pair + half];
  const float* const scales = p.scales == nullptr ? nullptr : p.scales + head / p.heads_per_scale * p.head_dim;
  row[pair] = (low * cosine - high * sine) * (scales == nullptr ? 1.0f : scales[pair]);
  row[pair + half] = (high * cosine + low * sine) * (scales == nullptr ? 1.0f : scales[pair + half]);
}

__global__ void __launch_bounds__(kThreads) angles_kernel(const __grid_constant__ CudaAngles p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int64_t>(threadIdx.x);
  if (i >= p.tokens * p.pairs) return;
  const int64_t pair = i % p.pairs, token = i / p.pairs;
  const float angle = static_cast<float>(p.positions[token]) * p.frequencies[pair];
  float* const row = p.angles + token * 2 * p.pairs;
  row[pair] = cosf(angle) * p.gain;
  row[p.pairs + pair] = sinf(angle) * p.gain;
}

}  // namespace

void launch(const CudaRotation& p, hopper::Stream stream) {
  const int64_t pairs = p.tokens * p.heads * (p.head_dim / 2);
  hopper::launch(rotate_kernel,
                 hopper::Grid{.blocks = {ceil_div(pairs, kThreads)}, .threads = kThreads, .stream = stream}, p);
}

void launch(const CudaAngles& p, hopper::Stream stream) {
  hopper::launch(
      angles_kernel,
      hopper::Grid{.blocks = {ceil_div(p.tokens * p.pairs, kThreads)}, .threads = kThreads, .stream = stream}, p);
}

}  // namespace tilewright::rope
