// SPDX-License-Identifier: Apache-2.0
// What the launches of the gradient's two forms share.
#pragma once

#include "ops/linear_attention/cuda/backward_reverse.cuh"

namespace tilewright::linear_attention::cuda::backward {

// Boxes of 64 tokens by 64 channels of a [B, T, heads, channels]; what lies outside reads as zero.
template <class T>
TensorMap map_of(const Rows<const uint16_t>& rows, int channels, int heads, const ChunkBackward& p) {
  const auto tokens = static_cast<uint64_t>(p.sequences.tokens), batches = static_cast<uint64_t>(p.batches);
  const uint64_t sizes[4] = {static_cast<uint64_t>(channels), static_cast<uint64_t>(heads), tokens, batches};
  const int64_t steps[3] = {rows.head, rows.token, rows.batch};
  uint64_t strides[3];
  // The stride of a dimension of one element is never used, and torch leaves anything there.
  for (int d = 0; d < 3; ++d) strides[d] = sizes[d + 1] == 1 ? 16 : static_cast<uint64_t>(steps[d]) * sizeof(T);
  const uint32_t box[4] = {kSlice, 1, kChunk, 1};
  return hopper::make_tensor_map<T>(rows.data, 4, sizes, strides, box, Swizzle::k128);
}

template <class T>
Params params_of(const ChunkBackward& p) {
  return {p, map_of<T>(p.q, p.key_size, p.heads, p), map_of<T>(p.k, p.key_size, p.heads, p),
          map_of<T>(p.v, p.value_size, p.value_heads, p), map_of<T>(p.d_out, p.value_size, p.value_heads, p)};
}

template <class T, int kKey, bool kDelta, bool kChannel>
void launch_sweeps(const Params& params, hopper::Stream stream) {
  const ChunkBackward& p = params.p;
  hopper::launch(sweeps_kernel<T, kKey, kDelta, kChannel>,
                 hopper::Grid{.blocks = {2 * p.sequences.count * p.value_heads * p.slices(), 1, 1},
                              .threads = kSweepThreads,
                              .shared_bytes = ReverseShared<T, kKey, kChannel>::kBytes,
                              .stream = stream},
                 params);
}

}  // namespace tilewright::linear_attention::cuda::backward
