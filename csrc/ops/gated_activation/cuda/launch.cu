// SPDX-License-Identifier: Apache-2.0
#include "core/memory.h"
#include "hopper/hopper.h"
#include "ops/gated_activation/cuda/launch.h"

namespace tilewright::gated_activation {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) gated_activation_kernel(const __grid_constant__ CudaProblem p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int64_t>(threadIdx.x);
  if (i < p.count) p.y[i] = p.gate[i] / (1.0f + expf(-p.gate[i])) * p.up[i];
}

}  // namespace

void launch(const CudaProblem& problem, hopper::Stream stream) {
  hopper::launch(gated_activation_kernel,
                 hopper::Grid{.blocks = {ceil_div(problem.count, kThreads)}, .threads = kThreads, .stream = stream},
                 problem);
}

}  // namespace tilewright::gated_activation
