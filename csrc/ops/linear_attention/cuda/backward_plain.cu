// SPDX-License-Identifier: Apache-2.0
#include "ops/linear_attention/cuda/backward_plain.cuh"

namespace tilewright::linear_attention::cuda {
namespace {

template <class T>
void launch_as(const PlainBackward<T>& p, hopper::Stream stream) {
  const int64_t tiles = p.sequences.count * p.value_heads * p.tiles;
  const hopper::Grid sweep{.blocks = {tiles, 1, 1},
                           .threads = plain::kThreads,
                           .shared_bytes = static_cast<int>(sizeof(plain::Stage<T>)),
                           .stream = stream};
  if (p.rule == Rule::kDelta) hopper::launch(plain::errors_kernel<T>, sweep, p);
  hopper::launch(plain::reverse_kernel<T>, sweep, p);
  hopper::launch(plain::forward_kernel<T>, sweep, p);
  hopper::launch(plain::collect_kernel<T>,
                 {.blocks = {p.places() * p.value_heads, 1, 1},
                  .threads = plain::kMaxKeySize,
                  .shared_bytes = static_cast<int>(sizeof(double)) * plain::kMaxKeySize / 32,
                  .stream = stream},
                 p);
}

}  // namespace

void launch_plain_backward(const PlainBackward<float>& problem, hopper::Stream stream) { launch_as(problem, stream); }
void launch_plain_backward(const PlainBackward<double>& problem, hopper::Stream stream) { launch_as(problem, stream); }

}  // namespace tilewright::linear_attention::cuda
