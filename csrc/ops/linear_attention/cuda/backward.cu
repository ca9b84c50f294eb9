// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ops/linear_attention/cuda/backward_collect.cuh"
#include "ops/linear_attention/cuda/backward_prepare.cuh"
#include "ops/linear_attention/cuda/backward_reverse.cuh"

namespace tilewright::linear_attention::cuda {
namespace {

using namespace backward;

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

template <class T, int kKey, bool kDelta>
void launch_as(const ChunkBackward& p, hopper::Stream stream) {
  const Params params{p, map_of<T>(p.q, p.key_size, p.heads, p), map_of<T>(p.k, p.key_size, p.heads, p),
                      map_of<T>(p.v, p.value_size, p.value_heads, p),
                      map_of<T>(p.d_out, p.value_size, p.value_heads, p)};
  hopper::launch(prepare_kernel<T, kKey, kDelta>,
                 hopper::Grid{.blocks = {p.places() * p.heads, 1, 1},
                              .threads = kGroup,
                              .shared_bytes = PrepareShared<T, kKey>::kBytes,
                              .stream = stream},
                 params);
  const int64_t columns = p.sequences.count * p.value_heads * p.slices();
  hopper::launch(states_kernel<T, kKey, kDelta>,
                 hopper::Grid{.blocks = {columns, 1, 1},
                              .threads = kSweepThreads,
                              .shared_bytes = StatesShared<T, kKey>::kBytes,
                              .stream = stream},
                 params);
  hopper::launch(reverse_kernel<T, kKey, kDelta>,
                 hopper::Grid{.blocks = {columns, 1, 1},
                              .threads = kSweepThreads,
                              .shared_bytes = ReverseShared<T, kKey>::kBytes,
                              .stream = stream},
                 params);
  hopper::launch(collect_kernel<T, kKey, kDelta>,
                 hopper::Grid{.blocks = {std::min<int64_t>(p.places() * p.heads, hopper::multiprocessors()), 1, 1},
                              .threads = kCollectThreads,
                              .shared_bytes = CollectShared<T, kKey>::kBytes,
                              .stream = stream},
                 params);
}

template <class T>
void launch_for(const ChunkBackward& p, hopper::Stream stream) {
  constexpr int kKey = ChunkBackward::kMaxKeySize;
  p.rule == Rule::kDelta ? launch_as<T, kKey, true>(p, stream) : launch_as<T, kKey, false>(p, stream);
}

}  // namespace

void launch_chunk_backward(const ChunkBackward& problem, hopper::Stream stream) {
  problem.storage == Storage::kBf16 ? launch_for<hopper::bf16>(problem, stream)
                                    : launch_for<hopper::f16>(problem, stream);
}

}  // namespace tilewright::linear_attention::cuda
