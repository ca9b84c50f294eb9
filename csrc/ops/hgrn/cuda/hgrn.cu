// SPDX-License-Identifier: Apache-2.0
// Instances of HGRN's kernels.
#include "core/memory.h"
#include "ops/hgrn/cuda/hgrn.cuh"

namespace tilewright::hgrn::cuda {
namespace {

hopper::Grid grid_of(int64_t sequences, int64_t width, hopper::Stream stream) {
  return {.blocks = {.x = sequences, .y = static_cast<int>(ceil_div(width, kThreads))},
          .threads = kThreads,
          .stream = stream};
}

}  // namespace

template <class T>
void launch_forward(const Problem<T>& p, hopper::Stream stream) {
  hopper::launch(forward_kernel<T>, grid_of(p.sequences, p.width, stream), ForwardParams<T>{p});
}

template <class T>
void launch_backward(const Problem<T>& p, const Gradients<T>& gradients, hopper::Stream stream) {
  hopper::launch(backward_kernel<T>, grid_of(p.sequences, p.width, stream), BackwardParams<T>{p, gradients});
}

template void launch_forward(const Problem<float>&, hopper::Stream);
template void launch_forward(const Problem<double>&, hopper::Stream);
template void launch_backward(const Problem<float>&, const Gradients<float>&, hopper::Stream);
template void launch_backward(const Problem<double>&, const Gradients<double>&, hopper::Stream);

}  // namespace tilewright::hgrn::cuda
