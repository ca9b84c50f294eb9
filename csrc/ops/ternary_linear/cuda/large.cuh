// SPDX-License-Identifier: Apache-2.0
// Many tokens: bound by the tensor cores. wgmma.m64nNk32 with weights as the register operand and tokens as N.
//
// A block is a producer warp and two warpgroups of consumers; tiles of 128 or 256 rows by kTokens tokens, walked by a
// persistent grid, tokens fastest so that blocks side by side read the same weights. A stage is 128 columns: 2048 bytes
// of weights for each 64 rows, copied whole, and a swizzled box of activations. A consumer decodes the next stage's
// weights into a second set of registers while the products of this one run; sixteen weights cost seven instructions,
// for which a scheduler has kTokens / 2 clocks or more. Sums of splits of K go through global memory: the last block to
// arrive adds them up, and integers do not mind the order.
#pragma once

#include "ops/ternary_linear/cuda/common.cuh"

namespace tilewright::ternary_linear::cuda {

struct LargeParams {
  Problem problem;
  hopper::TensorMap tokens;  // x as [M][K], boxes of 128 columns by kTokens rows
  int64_t row_tiles, token_tiles;
  int splits;
  int64_t chunks;  // of 128 columns
  bool weights_first;  // load weights before the previous kernel has ended
};

template <int kTokens, int kSubtiles>
struct Large {
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kConsumerThreads = kConsumers * 128;
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kStages = large_stages(kTokens, kSubtiles);
  static constexpr int kRowBlocks = kConsumers * kSubtiles;  // of 64 rows
  static constexpr int kWeightBytes = kRowBlocks * TernaryMma2::kBytesPerChunk;
  static constexpr int kTokenBytes = kTokens * TernaryMma2::kColsPerChunk;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  static constexpr int kSteps = TernaryMma2::kColsPerChunk / TernaryMma2::kColsPerStep;
  static_assert(kStageBytes == large_stage_bytes(kTokens, kSubtiles));
  using Product = hopper::Wgmma<int8_t, int8_t, kTokens>;
  using TokenTile = hopper::Tile<int8_t, kTokens, TernaryMma2::kColsPerChunk, hopper::Swizzle::k128>;
  using State = hopper::PipelineState<kStages>;

  struct Shared {
    hopper::Barrier full[kStages], empty[kStages];
    uint32_t is_last;
  };

  // One stage of tokens starts at a multiple of 1024 bytes: all of them come first, then all weights.
  static TILEWRIGHT_DEVICE Shared& shared() { return *reinterpret_cast<Shared*>(hopper::shared_memory()); }
  static TILEWRIGHT_DEVICE char* tokens_of(int stage) { return hopper::shared_memory() + 1024 + stage * kTokenBytes; }
  static TILEWRIGHT_DEVICE char* weights_of(int stage) {
    return hopper::shared_memory() + 1024 + kStages * kTokenBytes + stage * kWeightBytes;
  }

  struct Item {
    int64_t tile;
    int row_block, token;  // first
    int first_chunk, last_chunk;
    int split;
  };
  static TILEWRIGHT_DEVICE Item item_of(const LargeParams& params, int64_t index) {
    Item item;
    item.split = static_cast<int>(index % params.splits);
    item.tile = index / params.splits;
    item.token = static_cast<int>(item.tile % params.token_tiles) * kTokens;
    item.row_block = static_cast<int>(item.tile / params.token_tiles) * kRowBlocks;
    item.first_chunk = static_cast<int>(params.chunks * item.split / params.splits);
    item.last_chunk = static_cast<int>(params.chunks * (item.split + 1) / params.splits);
    return item;
  }
  static TILEWRIGHT_DEVICE int64_t items(const LargeParams& params) {
    return params.row_tiles * params.token_tiles * params.splits;
  }

  static TILEWRIGHT_DEVICE void begin() {
    Shared& s = shared();
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        hopper::init(s.full[i], 1);
        hopper::init(s.empty[i], kConsumers * 4);  // one arrival a warp
      }
      hopper::fence_barrier_init();
    }
    __syncthreads();
  }

  // A stage is announced whole; its weights and its tokens then come one after the other. Row blocks past N repeat the last.
  static TILEWRIGHT_DEVICE void load_weights(const LargeParams& params, const Item& item, int chunk, int stage) {
    const Problem& p = params.problem;
    const int64_t block_bytes = params.chunks * TernaryMma2::kBytesPerChunk;
    const int last_block = static_cast<int>((p.n - 1) / TernaryMma2::kRowsPerBlock);
    hopper::Barrier& full = shared().full[stage];
    hopper::arrive_expect(full, kStageBytes);
    for (int b = 0; b < kRowBlocks; ++b) {
      const int block = item.row_block + b < last_block ? item.row_block + b : last_block;
      hopper::load_bulk(weights_of(stage) + b * TernaryMma2::kBytesPerChunk,
                        p.payload + int64_t{block} * block_bytes + int64_t{chunk} * TernaryMma2::kBytesPerChunk,
                        TernaryMma2::kBytesPerChunk, full);
    }
  }

  // One thread keeps the ring full. The first round's weights need not wait for the kernel that makes the tokens.
  static TILEWRIGHT_DEVICE void produce(const LargeParams& params) {
    hopper::prefetch(params.tokens);
    int ahead = 0;
    if (params.weights_first) {
      const Item item = item_of(params, blockIdx.x);
      for (; ahead < kStages && item.first_chunk + ahead < item.last_chunk; ++ahead) {
        load_weights(params, item, item.first_chunk + ahead, ahead);
      }
    }
    hopper::wait_for_previous_kernel();
    State state;
    for (int64_t index = blockIdx.x; index < items(params); index += gridDim.x) {
      const Item item = item_of(params, index);
      for (int chunk = item.first_chunk; chunk < item.last_chunk; ++chunk, --ahead) {
        if (ahead <= 0) {
          hopper::wait(shared().empty[state.stage], state.phase ^ 1);
          load_weights(params, item, chunk, state.stage);
        }
        hopper::load_tile(tokens_of(state.stage), params.tokens, shared().full[state.stage],
                          chunk * TernaryMma2::kColsPerChunk, item.token);
        state.advance();
      }
    }
  }

  using Fragments = uint32_t[kSubtiles][kSteps][4];
  using Sums = int32_t[kSubtiles][Product::kRegisters];

  static TILEWRIGHT_DEVICE int group() { return static_cast<int>(threadIdx.x) / 128 - 1; }  // the producer's is -1

  // The weights of a stage for this thread: panels of its warp in each of its 64-row blocks.
  static TILEWRIGHT_DEVICE void decode_stage(int stage, Fragments& a) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
#pragma unroll
    for (int s = 0; s < kSubtiles; ++s) {
      const hopper::U128 words =
          hopper::load_16(weights_of(stage) + (group() * kSubtiles + s) * TernaryMma2::kBytesPerChunk + thread * 16);
      decode(words.x, a[s][0]);
      decode(words.y, a[s][1]);
      decode(words.z, a[s][2]);
      decode(words.w, a[s][3]);
    }
  }

  static TILEWRIGHT_DEVICE void issue(int stage, Fragments& a, Sums& sums, bool first) {
    hopper::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const hopper::Descriptor b = TokenTile::k_major(tokens_of(stage), 0, k * TernaryMma2::kColsPerStep);
#pragma unroll
      for (int s = 0; s < kSubtiles; ++s) Product::run(sums[s], a[s][k], b, !(first && k == 0));
    }
    hopper::wgmma_commit();
  }

  static TILEWRIGHT_DEVICE void keep_all(Fragments& a) {
#pragma unroll
    for (int s = 0; s < kSubtiles; ++s) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) hopper::keep(a[s][k]);
    }
  }

  // This warp has read its weights and waited for the products that read the tokens.
  static TILEWRIGHT_DEVICE void release(int stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) hopper::arrive(shared().empty[stage]);
  }

  // Products of one stage from `now`; meanwhile those before end and the next stage's weights go to `next`.
  static TILEWRIGHT_DEVICE void step(State& state, Fragments& now, Fragments& next, Sums& sums, bool first, bool more) {
    const int stage = state.stage;
    issue(stage, now, sums, first);
    hopper::wgmma_wait<1>();
    keep_all(next);
    if (!first) release(stage == 0 ? kStages - 1 : stage - 1);
    state.advance();
    if (more) {
      hopper::wait(shared().full[state.stage], state.phase);
      decode_stage(state.stage, next);
    }
  }

  // The second warpgroup stays at least kLead chunks behind the first: one stores its results while the other has the
  // tensor cores. Only where a block has several items; and a ring shorter than an item keeps the first from coming to the
  // next item's mark before the second has passed this one's.
  static constexpr int kLead = 4;
  static TILEWRIGHT_DEVICE bool leads(const LargeParams& params, int count) {
    return kTokens == 128 && count > kStages && items(params) > gridDim.x;
  }

  static TILEWRIGHT_DEVICE void accumulate(const LargeParams& params, State& state, const Item& item, Sums& sums) {
    const int count = item.last_chunk - item.first_chunk;
    if (group() == 1 && leads(params, count)) hopper::named_sync(2, kConsumerThreads);
    Fragments even = {}, odd = {};
    hopper::wait(shared().full[state.stage], state.phase);
    decode_stage(state.stage, even);
    for (int i = 0; i < count; i += 2) {
      if (i == kLead && group() == 0 && leads(params, count)) hopper::named_arrive(2, kConsumerThreads);
      step(state, even, odd, sums, i == 0, i + 1 < count);
      if (i + 1 < count) step(state, odd, even, sums, false, i + 2 < count);
    }
    hopper::wgmma_wait<0>();
    keep_all(even);
    keep_all(odd);
#pragma unroll
    for (int s = 0; s < kSubtiles; ++s) hopper::keep(sums[s]);
    release(state.stage == 0 ? kStages - 1 : state.stage - 1);
  }

  // Scales this split's sums back and leaves them for the others, or, if all others have left theirs, adds them. True: sums are complete.
  static TILEWRIGHT_DEVICE bool combine(const LargeParams& params, const Item& item, Sums& sums) {
    constexpr int64_t kTile = int64_t{kConsumerThreads} * kSubtiles * Product::kRegisters;
    const int thread = static_cast<int>(threadIdx.x) - 128;
    int32_t* tile = params.problem.partial + item.tile * params.splits * kTile;
    const auto each = [&](int split, const auto& use) {
      int32_t* at = tile + split * kTile + thread;
#pragma unroll
      for (int s = 0; s < kSubtiles; ++s) {
#pragma unroll
        for (int i = 0; i < Product::kRegisters; ++i) {
          use(at[(s * Product::kRegisters + i) * kConsumerThreads], sums[s][i]);
        }
      }
    };
    each(item.split, [](int32_t& there, int32_t& here) { there = here = unscaled(here); });
    __threadfence();
    hopper::named_sync(1, kConsumerThreads);
    if (thread == 0) {
      const uint32_t before = atomicAdd(params.problem.tickets + item.tile, 1u);
      shared().is_last = before + 1 == static_cast<uint32_t>(params.splits) ? 1u : 0u;
    }
    hopper::named_sync(1, kConsumerThreads);
    const bool is_last = shared().is_last != 0;
    hopper::named_sync(1, kConsumerThreads);  // before the next item overwrites it
    if (!is_last) return false;
    __threadfence();
    for (int split = 0; split < params.splits; ++split) {
      if (split != item.split) each(split, [](int32_t& there, int32_t& here) { here += __ldcg(&there); });
    }
    return true;
  }

  template <Element kElement>
  static TILEWRIGHT_DEVICE void store_as(const Problem& p, const Item& item, const Sums& sums, int shift) {
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
    const int first_token = item.token + lane % 4 * 2, last_token = static_cast<int>(p.m) - 1;
    constexpr int kAtOnce = 8;
#pragma unroll
    for (int s = 0; s < kSubtiles; ++s) {
      const int64_t n = int64_t{item.row_block + group() * kSubtiles + s} * TernaryMma2::kRowsPerBlock +
                        thread / 32 * TernaryMma2::kRowsPerPanel + lane / 4 * 2;
      if (n >= p.n) continue;
      const RowPair pair = row_pair(p, n);
#pragma unroll
      for (int begin = 0; begin < Product::kRegisters / 2; begin += kAtOnce) {
        // Some loads together: one before each store would be waited for each time. Tokens past M repeat the last.
        float token_scale[kAtOnce] = {};
        if constexpr (kElement != Element::kInt32) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int token = first_token + (begin + i) / 2 * 8 + i % 2;
            token_scale[i] = p.out.token_scales[token < last_token ? token : last_token];
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int64_t token = first_token + (begin + i) / 2 * 8 + i % 2;
          const int at = (begin + i) / 2 * 4 + i % 2;
          if (token > last_token) continue;
          store_pair<kElement>(p, pair, token, token_scale[i], sums[s][at] >> shift, sums[s][at + 2] >> shift);
        }
      }
    }
  }
  static TILEWRIGHT_DEVICE void store(const LargeParams& params, const Item& item, const Sums& sums) {
    const Problem& p = params.problem;
    const int shift = params.splits == 1 ? TernaryMma2::kScaleBits : 0;  // combine() has scaled the others back
    switch (p.out.element) {
      case Element::kInt32: return store_as<Element::kInt32>(p, item, sums, shift);
      case Element::kFloat: return store_as<Element::kFloat>(p, item, sums, shift);
      case Element::kBFloat16: return store_as<Element::kBFloat16>(p, item, sums, shift);
      case Element::kHalf: return store_as<Element::kHalf>(p, item, sums, shift);
    }
  }

  static TILEWRIGHT_DEVICE void consume(const LargeParams& params) {
    State state;
    for (int64_t index = blockIdx.x; index < items(params); index += gridDim.x) {
      const Item item = item_of(params, index);
      Sums sums = {};
      accumulate(params, state, item, sums);
      if (params.splits == 1 || combine(params, item, sums)) store(params, item, sums);
    }
  }
};

template <int kTokens, int kSubtiles>
__global__ void __launch_bounds__(384, 1) large_kernel(const __grid_constant__ LargeParams params) {
  using Kernel = Large<kTokens, kSubtiles>;
  Kernel::begin();
  hopper::allow_next_kernel();
  if (threadIdx.x < 128) {
    hopper::lower_registers<24>();
    if (threadIdx.x == 0) Kernel::produce(params);
  } else {
    hopper::raise_registers<240>();
    hopper::wait_for_previous_kernel();
    Kernel::consume(params);
  }
}

}  // namespace tilewright::ternary_linear::cuda
