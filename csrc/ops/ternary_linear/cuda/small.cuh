// SPDX-License-Identifier: Apache-2.0
// Few tokens: bound by reading the weights. Limits: at most 16 tokens.
//
// A block takes 1, 2 or 4 panels of 16 rows and all columns. Each warp walks chunks of 128 columns of one panel, a 16-byte
// load a thread each, kAhead loads in flight; the activations lie in shared memory and become matrix operands by ldmatrix.
// Weights are the 16-row operand of mma.m16n8k32 even for one token: 7 instructions decode 16 weights a thread and one
// multiplies them, where dot products of four bytes would take four. At the rate of device memory a scheduler has about
// 34 clocks for each such word of a warp, so nothing but the loads counts. The first loads leave before the kernel waits
// for the one that quantizes the activations.
#pragma once

#include "ops/ternary_linear/cuda/common.cuh"

namespace tilewright::ternary_linear::cuda {

struct SmallParams {
  Problem problem;
  int panels;  // of a block
  int phase_chunks;  // whose activations are in shared memory at a time
};

template <int kGroups>  // of 8 tokens
struct Small {
  static constexpr int kThreads = kSmallWarps * 32;
  static constexpr int kAhead = 8 / kGroups;
  static constexpr int kMaxTokens = 8 * kGroups;
  static constexpr int kRowGap = 16;  // bytes: rows of a fragment start in different banks

  struct Warp {
    const uint8_t* weights;  // this thread's 16 bytes of chunk 0
    int64_t chunks;  // of all columns
    int slot, slots;  // this warp takes chunks slot, slot + slots, ...
    hopper::U128 ahead[kAhead];
    int32_t acc[kGroups][4];
    int32_t total[kGroups][4];
  };

  static TILEWRIGHT_DEVICE hopper::U128 load(const Warp& warp, int64_t chunk) {
    return hopper::load_16_streaming(warp.weights + chunk * TernaryMma2::kBytesPerChunk);
  }

  static TILEWRIGHT_DEVICE void begin(const SmallParams& params, Warp& warp) {
    const Problem& p = params.problem;
    const int index = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t panel = static_cast<int64_t>(blockIdx.x) * params.panels + index % params.panels;
    warp.chunks = TernaryMma2::chunks(p.k);
    warp.weights = p.payload + panel / TernaryMma2::kPanels * TernaryMma2::block_bytes(p.k) +
                   panel % TernaryMma2::kPanels * TernaryMma2::kBytesPerPanel + lane * 16;
    warp.slot = index / params.panels;
    warp.slots = kSmallWarps / params.panels;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t chunk = warp.slot + u * warp.slots;
      warp.ahead[u] = chunk < warp.chunks ? load(warp, chunk) : hopper::U128{};
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) warp.acc[g][i] = warp.total[g][i] = 0;
    }
  }

  // Columns [first, first + phase) of all tokens to shared memory, zero from K on.
  static TILEWRIGHT_DEVICE void stage(const SmallParams& params, char* tokens, int row_bytes, int64_t first,
                                      int count) {
    const Problem& p = params.problem;
    const int pieces = count * (TernaryMma2::kColsPerChunk / 16);
    const int all = static_cast<int>(p.m) * pieces;
    for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) {
      const int token = i / pieces, piece = i % pieces;
      const int64_t column = first + piece * 16;
      const int64_t left = p.k - column;
      const int valid = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
      const int8_t* row = p.x + token * p.x_stride;
      hopper::copy_async_16(tokens + token * row_bytes + piece * 16, valid > 0 ? row + column : row, valid);
    }
    hopper::copy_async_commit();
    hopper::copy_async_wait<0>();
    __syncthreads();
  }

  // One chunk: four steps of 32 columns. `row` is this lane's row of the fragments in shared memory.
  static TILEWRIGHT_DEVICE void multiply(Warp& warp, const hopper::U128& words, const char* const (&row)[kGroups],
                                         int column) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[kGroups][4];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) hopper::ldmatrix_x4(b[g], row[g] + column + half * 64);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t a[4];
        decode(word[2 * half + s], a);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const uint32_t pair[2] = {b[g][2 * s], b[g][2 * s + 1]};
          hopper::mma_m16n8k32_s8s8(warp.acc[g], a, pair);
        }
      }
    }
  }

  // Chunks [first, last) of the columns in shared memory. At most 64 chunks: sums stay within 64 * 128 * 8192 = 2^26.
  static TILEWRIGHT_DEVICE void walk(Warp& warp, const char* const (&row)[kGroups], int64_t first, int64_t last) {
    for (int64_t base = first + warp.slot; base < last; base += kAhead * warp.slots) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int64_t chunk = base + u * warp.slots;
        if (chunk >= last) break;
        const hopper::U128 words = warp.ahead[u];
        const int64_t next = chunk + kAhead * warp.slots;
        if (next < warp.chunks) warp.ahead[u] = load(warp, next);
        multiply(warp, words, row, static_cast<int>(chunk - first) * TernaryMma2::kColsPerChunk);
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        warp.total[g][i] += unscaled(warp.acc[g][i]);
        warp.acc[g][i] = 0;
      }
    }
  }

  // Sums of the warps that share a panel, then results. sums: [warp][token][16 rows].
  static TILEWRIGHT_DEVICE void finish(const SmallParams& params, const Warp& warp, int32_t* sums) {
    const Problem& p = params.problem;
    const int index = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
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
    for (int i = static_cast<int>(threadIdx.x); i < pairs * p.m; i += kThreads) {
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
  const Problem& p = params.problem;
  typename Kernel::Warp warp;
  Kernel::begin(params, warp);
  hopper::wait_for_previous_kernel();
  hopper::allow_next_kernel();

  char* tokens = hopper::shared_memory();
  const int kept = static_cast<int>(warp.chunks < params.phase_chunks ? warp.chunks : params.phase_chunks);
  const int row_bytes = kept * TernaryMma2::kColsPerChunk + Kernel::kRowGap;
  auto* sums = reinterpret_cast<int32_t*>(tokens + static_cast<int>(p.m) * row_bytes);
  // Lane l gives row l % 8 and quarter l / 8 of 64 columns. Tokens past M repeat the last: nobody reads their results.
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const char* row[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int token = g * 8 + lane % 8, last = static_cast<int>(p.m) - 1;
    row[g] = tokens + (token < last ? token : last) * row_bytes + lane / 8 * 16;
  }
  for (int64_t first = 0; first < warp.chunks; first += kept) {
    const int64_t last = first + kept < warp.chunks ? first + kept : warp.chunks;
    if (first > 0) __syncthreads();
    Kernel::stage(params, tokens, row_bytes, first * TernaryMma2::kColsPerChunk, static_cast<int>(last - first));
    Kernel::walk(warp, row, first, last);
  }
  Kernel::finish(params, warp, sums);
}

}  // namespace tilewright::ternary_linear::cuda
