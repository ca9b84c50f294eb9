// SPDX-License-Identifier: Apache-2.0
// Few tokens: bound by reading the weights. Limits: at most 16 tokens.
//
// A block takes 1, 2, 4 or 8 panels of 16 rows and all columns. Each warp walks chunks of 128 columns of one panel, a 16-byte
// load a thread each, kAhead loads in flight. Weights are the 16-row operand of mma.m16n8k32 even for one token: 7
// instructions decode 16 weights a thread and one multiplies them, where dot products of four bytes would take four. At
// the rate of device memory a scheduler has about 34 clocks for each such word of a warp, so latencies count and little
// else:
// - Activations are the same for all blocks, and a cache slice that serves 200 blocks with one line takes longer than the
//   weights do. So the blocks of a cluster fetch them together, each a part, which the copy engine gives to all.
// - The four steps of a chunk have sums of their own, so that no product waits for the one before.
// - The kernel starts while the one before it ends, and where that is the one which quantizes the activations, and
//   everything earlier is over, the weights' loads do not wait for it.
#pragma once

#include "ops/ternary_linear/cuda/common.cuh"

namespace tilewright::ternary_linear::cuda {

struct SmallParams {
  Problem problem;
  hopper::TensorMap tokens;  // x as [M][K], boxes of 128 columns by 8 or 16 rows, zero past M and K
  int panels;  // of a block
  int phase_chunks;  // whose activations are in shared memory at a time
  int cluster;  // blocks that fetch activations together
  bool weights_first;  // load weights before the previous kernel has ended
};

template <int kGroups>  // of 8 tokens
struct Small {
  static constexpr int kThreads = kSmallWarps * 32;
  static constexpr int kAhead = 8 / kGroups;
  static constexpr int kMaxTokens = 8 * kGroups;
  static constexpr int kSteps = TernaryMma2::kColsPerChunk / TernaryMma2::kColsPerStep;
  static constexpr int kSums = kSteps / kGroups;  // for each token and row
  using TokenTile = hopper::Tile<int8_t, kMaxTokens, TernaryMma2::kColsPerChunk, hopper::Swizzle::k128>;

  struct Warp {
    const uint8_t* weights;  // this thread's 16 bytes of chunk 0
    int chunks;  // of all columns
    int slot, slots;  // this warp takes chunks slot, slot + slots, ...
    hopper::U128 ahead[kAhead];
    int32_t acc[kSums][kGroups][4];
    int32_t total[kGroups][4];
    uint32_t fragment[2];  // of a token tile: where this lane's 16 bytes of columns 0..63 and 64..127 are
  };

  static TILEWRIGHT_DEVICE hopper::Barrier& full() {
    return *reinterpret_cast<hopper::Barrier*>(hopper::shared_memory());
  }
  static TILEWRIGHT_DEVICE char* tokens_of(int chunk) {
    return hopper::shared_memory() + kSmallHeaderBytes + chunk * TokenTile::kBytes;
  }

  static TILEWRIGHT_DEVICE hopper::U128 load(const Warp& warp, int chunk) {
    return hopper::load_16_streaming(warp.weights + int64_t{chunk} * TernaryMma2::kBytesPerChunk);
  }

  // Panels past the last, of blocks that only fill a cluster, repeat it.
  static TILEWRIGHT_DEVICE void begin(const SmallParams& params, Warp& warp) {
    const Problem& p = params.problem;
    const int index = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t wanted = static_cast<int64_t>(blockIdx.x) * params.panels + index % params.panels;
    const int64_t last = (p.n - 1) / TernaryMma2::kRowsPerPanel;
    const int64_t panel = wanted < last ? wanted : last;
    warp.chunks = static_cast<int>(TernaryMma2::chunks(p.k));
    warp.weights = p.payload + panel / TernaryMma2::kPanels * TernaryMma2::block_bytes(p.k) +
                   panel % TernaryMma2::kPanels * TernaryMma2::kBytesPerPanel + lane * 16;
    warp.slot = index / params.panels;
    warp.slots = kSmallWarps / params.panels;
#pragma unroll
    for (int half = 0; half < 2; ++half) warp.fragment[half] = TokenTile::offset(lane % 8, half * 64 + lane / 8 * 16);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        warp.total[g][i] = 0;
#pragma unroll
        for (int s = 0; s < kSums; ++s) warp.acc[s][g][i] = 0;
      }
    }
  }

  static TILEWRIGHT_DEVICE void load_ahead(Warp& warp) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int chunk = warp.slot + u * warp.slots;
      warp.ahead[u] = chunk < warp.chunks ? load(warp, chunk) : hopper::U128{};
    }
  }

  // Every block's barrier is ready before any block's copy can reach it.
  static TILEWRIGHT_DEVICE void begin_barrier(const SmallParams& params) {
    if (threadIdx.x == 0) {
      hopper::prefetch(params.tokens);
      hopper::init(full(), 1);
      hopper::fence_barrier_init();
    }
    params.cluster > 1 ? hopper::cluster_sync() : __syncthreads();
  }

  // `count` chunks of the tokens' columns from chunk `first` on to shared memory, phase after phase.
  static TILEWRIGHT_DEVICE void stage(const SmallParams& params, int first, int count, uint32_t phase) {
    if (threadIdx.x == 0) {
      hopper::arrive_expect(full(), static_cast<uint32_t>(count) * TokenTile::kBytes);
      const int rank = params.cluster > 1 ? hopper::cluster_rank() : 0;
      for (int c = rank; c < count; c += params.cluster) {
        const int column = (first + c) * TernaryMma2::kColsPerChunk;
        if (params.cluster > 1) {
          const auto blocks = static_cast<uint16_t>((1u << params.cluster) - 1u);
          hopper::load_tile_multicast(tokens_of(c), params.tokens, full(), blocks, column, 0);
        } else {
          hopper::load_tile(tokens_of(c), params.tokens, full(), column, 0);
        }
      }
    }
    hopper::wait(full(), phase);
  }

  // One chunk: four steps of 32 columns.
  static TILEWRIGHT_DEVICE void multiply(Warp& warp, const hopper::U128& words, const char* tokens) {
    const uint32_t word[kSteps] = {words.x, words.y, words.z, words.w};
    uint32_t b[kGroups][2][4];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        hopper::ldmatrix_x4(b[g][half], tokens + g * 8 * TernaryMma2::kColsPerChunk + warp.fragment[half]);
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[4];
      decode(word[s], a);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint32_t pair[2] = {b[g][s / 2][2 * (s % 2)], b[g][s / 2][2 * (s % 2) + 1]};
        hopper::mma_m16n8k32_s8s8(warp.acc[s % kSums][g], a, pair);
      }
    }
  }

  // Chunks [first, last) of the columns, in shared memory. At most 64: sums stay within 64 * 128 * 8192 = 2^26.
  static TILEWRIGHT_DEVICE void walk(Warp& warp, int first, int last) {
    for (int base = first + warp.slot; base < last; base += kAhead * warp.slots) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int chunk = base + u * warp.slots;
        if (chunk >= last) break;
        const hopper::U128 words = warp.ahead[u];
        const int next = chunk + kAhead * warp.slots;
        if (next < warp.chunks) warp.ahead[u] = load(warp, next);
        multiply(warp, words, tokens_of(chunk - first));
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          warp.total[g][i] += unscaled(warp.acc[s][g][i]);
          warp.acc[s][g][i] = 0;
        }
      }
    }
  }

  // Sums of the warps that share a panel, then results. sums: [warp][token][16 rows].
  static TILEWRIGHT_DEVICE void finish(const SmallParams& params, const Warp& warp) {
    const Problem& p = params.problem;
    const int index = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    auto* sums = reinterpret_cast<int32_t*>(hopper::shared_memory() + kSmallBarrierBytes);
    auto* mine = sums + index * kMaxTokens * TernaryMma2::kRowsPerPanel;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = g * 8 + lane % 4 * 2 + i % 2, row = lane / 4 * 2 + i / 2;
        mine[token * TernaryMma2::kRowsPerPanel + row] = warp.total[g][i];
      }
    }
    __syncthreads();
    constexpr int kPairs = TernaryMma2::kRowsPerPanel / 2;
    const int pairs = params.panels * kPairs;
    for (int i = static_cast<int>(threadIdx.x); i < pairs * static_cast<int>(p.m); i += kThreads) {
      const int token = i / pairs, panel = i % pairs / kPairs, row = i % kPairs * 2;
      int32_t first = 0, second = 0;
      for (int w = panel; w < kSmallWarps; w += params.panels) {
        const int32_t* at = sums + (w * kMaxTokens + token) * TernaryMma2::kRowsPerPanel + row;
        first += at[0];
        second += at[1];
      }
      const int64_t n = (static_cast<int64_t>(blockIdx.x) * params.panels + panel) * TernaryMma2::kRowsPerPanel + row;
      if (n >= p.n) continue;
      store_pair(p, row_pair(p, n), token, first, second);
    }
  }
};

template <int kGroups>
__global__ void __launch_bounds__(kSmallWarps * 32, 2) small_kernel(const __grid_constant__ SmallParams params) {
  using Kernel = Small<kGroups>;
  typename Kernel::Warp warp;
  Kernel::begin(params, warp);
  Kernel::begin_barrier(params);  // before any load: the cluster's barrier would wait for it
  if (params.weights_first) Kernel::load_ahead(warp);
  hopper::wait_for_previous_kernel();
  hopper::allow_next_kernel();
  if (!params.weights_first) Kernel::load_ahead(warp);

  uint32_t phase = 0;
  for (int first = 0; first < warp.chunks; first += params.phase_chunks) {
    const int last = first + params.phase_chunks < warp.chunks ? first + params.phase_chunks : warp.chunks;
    // All blocks have read the last phase's tokens before any block's copy replaces them.
    if (first > 0) params.cluster > 1 ? hopper::cluster_sync() : __syncthreads();
    Kernel::stage(params, first, last - first, phase);
    Kernel::walk(warp, first, last);
    phase ^= 1;
  }
  Kernel::finish(params, warp);
}

}  // namespace tilewright::ternary_linear::cuda
