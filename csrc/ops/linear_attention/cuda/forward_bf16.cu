// SPDX-License-Identifier: Apache-2.0
// The chunk form for bfloat16.
#include "ops/linear_attention/cuda/forward_launch.cuh"

namespace tilewright::linear_attention::cuda {

template void launch_chunks(const Problem<hopper::bf16, float>&, char*, hopper::Stream);

}  // namespace tilewright::linear_attention::cuda
