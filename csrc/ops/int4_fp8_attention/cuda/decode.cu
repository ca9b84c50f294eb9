// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_fp8_attention/cuda/decode.cuh"
#include "ops/int4_fp8_attention/cuda/launch.h"

namespace tilewright::int4_fp8_attention::cuda {
namespace {

template <int D, class Step, int kTerms>
void launch_decode(const Attention& p, hopper::Stream stream) {
  const int64_t chunks = p.partials == nullptr ? 1 : most_chunks(p.cache.capacity);
  const int64_t items = most_row_blocks(p, kDecodeRows) * p.cache.heads * chunks;
  const int64_t blocks = smaller<int64_t>(items, int64_t{kDecodeBlocks<D, Step, kTerms>} * hopper::multiprocessors());
  hopper::launch(decode_attention<D, Step, kTerms>,
                 hopper::Grid{.blocks = {blocks},
                              .threads = kDecodeThreads,
                              .shared_bytes = static_cast<int>(sizeof(DecodeShared<D>)),
                              .stream = stream},
                 p);
}

template <int D, class Step>
void launch_terms(const Attention& p, hopper::Stream stream) {
  return p.query == Query::kFp8 ? launch_decode<D, Step, 1>(p, stream) : launch_decode<D, Step, 2>(p, stream);
}

template <int D>
void launch_format(const Attention& p, hopper::Stream stream) {
  return p.cache.format == CacheFormat::kInt4 ? launch_terms<D, Int4Step<D>>(p, stream)
                                              : launch_terms<D, BFloat16Step<D>>(p, stream);
}

}  // namespace

void attend_decode(const Attention& p, hopper::Stream stream) {
  if (p.cache.head_dim <= 64) {
    launch_format<64>(p, stream);
  } else if (p.cache.head_dim <= 128) {
    launch_format<128>(p, stream);
  } else {
    launch_terms<256, Int4Step<256>>(p, stream);
  }
  if (p.partials == nullptr) return;
  hopper::launch(combine_chunks,
                 hopper::Grid{.blocks = {ceil_div(p.tokens * p.heads, kCombineWarps)},
                              .threads = kCombineWarps * kWarp,
                              .stream = stream,
                              .overlap = true},
                 p);
}

}  // namespace tilewright::int4_fp8_attention::cuda
