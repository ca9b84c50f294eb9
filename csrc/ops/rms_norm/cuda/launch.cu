// SPDX-License-Identifier: Apache-2.0
// One block a token: each thread sums its columns' squares, warps by halving, then the warps' sums in order.
// Error of the mean: width / 256 additions in a thread, 5 halvings, 8 warps: below (width / 256 + 13) * 2^-24.
#include "hopper/hopper.h"
#include "ops/rms_norm/cuda/launch.h"

namespace tilewright::rms_norm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const __grid_constant__ CudaProblem p) {
  auto* const sums = reinterpret_cast<float*>(hopper::shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.width;
  float sum = 0.0f;
  for (int64_t i = thread; i < p.width; i += kThreads) sum = fmaf(p.x[row + i], p.x[row + i], sum);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (thread % 32 == 0) sums[thread / 32] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  const float inverse = 1.0f / sqrtf(total / static_cast<float>(p.width) + p.eps);
  for (int64_t i = thread; i < p.width; i += kThreads) p.y[row + i] = p.weight[i] * (p.x[row + i] * inverse);
}

}  // namespace

void launch(const CudaProblem& problem, hopper::Stream stream) {
  hopper::launch(rms_norm_kernel,
                 hopper::Grid{.blocks = {problem.tokens},
                              .threads = kThreads,
                              .shared_bytes = kWarps * static_cast<int>(sizeof(float)),
                              .stream = stream},
                 problem);
}

}  // namespace tilewright::rms_norm
