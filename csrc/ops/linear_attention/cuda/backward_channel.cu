// SPDX-License-Identifier: Apache-2.0
#include "ops/linear_attention/cuda/backward_collect_channel.cuh"
#include "ops/linear_attention/cuda/backward_launch.cuh"

namespace tilewright::linear_attention::cuda {
namespace {

using namespace backward;

template <class T, int kKey, bool kDelta>
void launch_as(const ChunkBackward& p, hopper::Stream stream) {
  const Params params = params_of<T>(p);
  hopper::launch(prepare_channel_kernel<T, kKey, kDelta>,
                 hopper::Grid{.blocks = {p.places() * p.value_heads, 1, 1},
                              .threads = kGroup,
                              .shared_bytes = ChannelPrepareShared<T, kKey>::kBytes,
                              .stream = stream},
                 params);
  launch_sweeps<T, kKey, kDelta, true>(params, stream);
  hopper::launch(collect_channel_kernel<T, kKey, kDelta>,
                 hopper::Grid{.blocks = {p.places() * p.value_heads, 1, 1},
                              .threads = kChannelThreads,
                              .shared_bytes = ChannelCollectShared<T, kKey>::kBytes,
                              .stream = stream},
                 params);
}

template <class T>
void launch_for(const ChunkBackward& p, hopper::Stream stream) {
  constexpr int kKey = ChunkBackward::kMaxKeySize;
  p.rule == Rule::kDelta ? launch_as<T, kKey, true>(p, stream) : launch_as<T, kKey, false>(p, stream);
}

}  // namespace

void launch_channel_backward(const ChunkBackward& problem, hopper::Stream stream) {
  problem.storage == Storage::kBf16 ? launch_for<hopper::bf16>(problem, stream)
                                    : launch_for<hopper::f16>(problem, stream);
}

}  // namespace tilewright::linear_attention::cuda
