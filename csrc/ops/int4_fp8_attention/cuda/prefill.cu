// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_fp8_attention/cuda/launch.h"
#include "ops/int4_fp8_attention/cuda/prefill.cuh"

namespace tilewright::int4_fp8_attention::cuda {
namespace {

template <int D>
void launch_prefill(const Attention& p, hopper::Stream stream) {
  static_assert(sizeof(PrefillShared<D>) <= hopper::kMaxSharedBytes, "the block's shared memory");
  const int64_t items = most_prefill_blocks(p) * p.cache.heads;
  hopper::launch(prefill_attention<D>,
                 hopper::Grid{.blocks = {smaller<int64_t>(items, hopper::multiprocessors())},
                              .threads = kPrefillThreads,
                              .shared_bytes = static_cast<int>(sizeof(PrefillShared<D>)),
                              .stream = stream},
                 p);
}

}  // namespace

void attend_prefill(const Attention& p, hopper::Stream stream) {
  if (p.cache.head_dim <= 64) {
    launch_prefill<64>(p, stream);
  } else {
    launch_prefill<128>(p, stream);
  }
}

}  // namespace tilewright::int4_fp8_attention::cuda
