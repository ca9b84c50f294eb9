// SPDX-License-Identifier: Apache-2.0
// wgmma: its fences, groups, operands and accumulators.
#include "cases.h"

namespace tilewright::emulator_tests {
namespace {

enum class Mma {
  kRight,
  kTwoGroups,
  kFromRegisters,
  kNoFence,
  kWrittenAfterFence,
  kRegistersAfterFence,
  kNoProxyFence,
  kProxyFenceByOne,
  kProxyFenceLate,
  kNoSync,
  kNoCommit,
  kNoWait,
  kWaitForAllButOne,
  kReadInFlight,
  kWriteInFlight,
  kOperandOverwritten,
  kOperandReused,
  kDescriptorPastEnd,
  kDescriptorInPattern,
  kDescriptorsDiffer,
  kHalfAWarpgroup,
  kUnwrittenOperand,
  kReturns,
};

struct MmaParams {
  const bf16* a;  // [64][64]
  const bf16* b;  // [32][64]
  float* d;       // [64][32]
};

using TileA = Tile<bf16, 64, 64, Swizzle::k128>;
using TileB = Tile<bf16, 32, 64, Swizzle::k128>;
using Product = Wgmma<bf16, bf16, 32>;

template <Mma F>
TILEWRIGHT_DEVICE void fill(const MmaParams& p, char* a, char* b) {
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 64; i += 128) *TileA::at(a, i / 64, i % 64) = p.a[i];
  for (int i = static_cast<int>(threadIdx.x); i < 32 * 64; i += 128) {
    if (F != Mma::kUnwrittenOperand || i != 700) *TileB::at(b, i / 64, i % 64) = p.b[i];
  }
  if (F == Mma::kProxyFenceLate) __syncthreads();
  if (F != Mma::kNoProxyFence && (F != Mma::kProxyFenceByOne || threadIdx.x == 0)) fence_async_shared();
  if (F != Mma::kNoSync && F != Mma::kProxyFenceLate) __syncthreads();
}

template <Mma F>
__global__ void __launch_bounds__(128, 1) product(const __grid_constant__ MmaParams p) {
  char* const a = shared_memory();
  char* const b = shared_memory() + TileA::kBytes;
  const int t = static_cast<int>(threadIdx.x);
  fill<F>(p, a, b);
  float d[Product::kRegisters];
  for (int i = 0; i < Product::kRegisters; ++i) d[i] = 0.0f;
  uint32_t fragment[4][4];
  for (int step = 0; step < 4; ++step) {
    for (int j = 0; j < 4; ++j) {
      const int row = t / 32 * 16 + t % 32 / 4 + 8 * (j % 2), k = step * 16 + 2 * (t % 4) + 8 * (j / 2);
      fragment[step][j] = *reinterpret_cast<const uint32_t*>(p.a + row * 64 + k);
    }
  }
  if (F == Mma::kHalfAWarpgroup && t >= 64) return;
  if (F != Mma::kNoFence) wgmma_fence();
  if (F == Mma::kWrittenAfterFence) d[3] = 1.0f;
  if (F == Mma::kRegistersAfterFence) fragment[2][1] ^= p.d == nullptr;
  for (int step = 0; step < 4; ++step) {
    const int k = step * 16 + (F == Mma::kDescriptorsDiffer && t == 77 ? 16 : 0);
    Descriptor right = TileB::k_major(b, F == Mma::kDescriptorPastEnd ? 8 : 0, k % 64);
    if (F == Mma::kDescriptorInPattern) right = right.advanced(128);
    if (F == Mma::kFromRegisters || F == Mma::kRegistersAfterFence) {
      Product::run(d, fragment[step], right, true);
    } else {
      Product::run(d, TileA::k_major(a, 0, step * 16), right, true);
    }
    if (F == Mma::kTwoGroups || F == Mma::kWaitForAllButOne) wgmma_commit();
  }
  if (F != Mma::kNoCommit) wgmma_commit();
  if (F == Mma::kReturns && t == 3) return;
  if (F == Mma::kReadInFlight) p.d[t] = d[1];
  if (F == Mma::kWriteInFlight) d[2] = p.d[0];
  if (F == Mma::kOperandOverwritten && t == 9) *TileB::at(b, 1, 1) = p.b[0];
  if (F == Mma::kWaitForAllButOne) {
    wgmma_wait<2>();  // the last real group and the empty one
  } else if (F != Mma::kNoWait) {
    wgmma_wait<0>();
  }
  keep(d);
  if (F == Mma::kOperandReused) fill<F>(p, a, b);  // other warps may still be waiting
  for (int i = 0; i < Product::kRegisters; ++i) p.d[accumulator_row(t, i) * 32 + accumulator_col(t, i)] = d[i];
}

bf16 small(size_t i) { return from_float<bf16>(static_cast<float>(static_cast<int>(i * 7 % 11) - 5)); }

template <Mma F>
bool run_product() {
  Global<bf16> a(64 * 64), b(32 * 64);
  Global<float> d(64 * 32);
  for (size_t i = 0; i < a.size(); ++i) a[i] = small(i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = small(3 * i + 1);
  launch(product<F>, Grid{.threads = 128, .shared_bytes = TileA::kBytes + TileB::kBytes},
         MmaParams{a.data(), b.data(), d.data()});
  for (size_t m = 0; m < 64; ++m) {
    for (size_t n = 0; n < 32; ++n) {
      float sum = 0.0f;
      for (size_t k = 0; k < 64; ++k) sum += to_float(a[m * 64 + k]) * to_float(b[n * 64 + k]);
      if (d[m * 32 + n] != sum) return false;
    }
  }
  return true;
}

enum class Chain { kRight, kLateWait };

// A ring of operands: the tile of step i is written while the product of step i - 1 is under way.
template <Chain F>
__global__ void __launch_bounds__(128, 1) chain(const __grid_constant__ MmaParams p) {
  const int t = static_cast<int>(threadIdx.x);
  using Left = Tile<bf16, 64, 16, Swizzle::k32>;
  using Right = Tile<bf16, 32, 16, Swizzle::k32>;
  float d[Product::kRegisters];
  for (int i = 0; i < Product::kRegisters; ++i) d[i] = 0.0f;
  for (int step = 0; step < 4; ++step) {
    char* const a = shared_memory() + step % 2 * 4096;
    char* const b = a + Left::kBytes;
    for (int i = t; i < 64 * 16; i += 128) *Left::at(a, i / 16, i % 16) = p.a[i / 16 * 64 + step * 16 + i % 16];
    for (int i = t; i < 32 * 16; i += 128) *Right::at(b, i / 16, i % 16) = p.b[i / 16 * 64 + step * 16 + i % 16];
    fence_async_shared();
    __syncthreads();
    wgmma_fence();
    Product::run(d, Left::k_major(a, 0, 0), Right::k_major(b, 0, 0), true);
    wgmma_commit();
    if (F == Chain::kRight) {
      wgmma_wait<1>();
      __syncthreads();
    }
  }
  wgmma_wait<0>();
  for (int i = 0; i < Product::kRegisters; ++i) p.d[accumulator_row(t, i) * 32 + accumulator_col(t, i)] = d[i];
}

template <Chain F>
bool run_chain() {
  Global<bf16> a(64 * 64), b(32 * 64);
  Global<float> d(64 * 32);
  for (size_t i = 0; i < a.size(); ++i) a[i] = small(i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = small(3 * i + 1);
  launch(chain<F>, Grid{.threads = 128, .shared_bytes = 8192}, MmaParams{a.data(), b.data(), d.data()});
  for (size_t m = 0; m < 64; ++m) {
    for (size_t n = 0; n < 32; ++n) {
      float sum = 0.0f;
      for (size_t k = 0; k < 64; ++k) sum += to_float(a[m * 64 + k]) * to_float(b[n * 64 + k]);
      if (d[m * 32 + n] != sum) return false;
    }
  }
  return true;
}

}  // namespace

std::vector<Case> product_cases() {
  return {
      {"wgmma", "", run_product<Mma::kRight>},
      {"wgmma in groups", "", run_product<Mma::kTwoGroups>},
      {"wgmma, A in registers", "", run_product<Mma::kFromRegisters>},
      {"wgmma without wgmma_fence", "without a wgmma_fence()", run_product<Mma::kNoFence>},
      {"wgmma, accumulator written after the fence", "registers of D were written after the last wgmma_fence()",
       run_product<Mma::kWrittenAfterFence>},
      {"wgmma, A in registers written after the fence", "registers of A were written after the last wgmma_fence()",
       run_product<Mma::kRegistersAfterFence>},
      {"wgmma without fence_async_shared", "without a fence_async_shared() since", run_product<Mma::kNoProxyFence>},
      {"wgmma, one thread's fence_async_shared", "without a fence_async_shared() since",
       run_product<Mma::kProxyFenceByOne>},
      {"wgmma, fence_async_shared after __syncthreads",
       "without a fence_async_shared() since|came only after the barrier", run_product<Mma::kProxyFenceLate>},
      {"wgmma without __syncthreads", "wgmma (operand", run_product<Mma::kNoSync>},
      {"wgmma without commit", "wgmma", run_product<Mma::kNoCommit>},
      {"wgmma without wait", "reads accumulator register", run_product<Mma::kNoWait>},
      {"wgmma, wait for all but one", "reads accumulator register", run_product<Mma::kWaitForAllButOne>},
      {"wgmma, accumulator read under way", "reads accumulator register 1", run_product<Mma::kReadInFlight>},
      {"wgmma, accumulator written under way", "writes accumulator register 2", run_product<Mma::kWriteInFlight>},
      {"wgmma, operand overwritten under way", "shared byte", run_product<Mma::kOperandOverwritten>},
      {"wgmma, operand reused without __syncthreads", "shared byte", run_product<Mma::kOperandReused>},
      {"wgmma, descriptor past the end", "outside the block's", run_product<Mma::kDescriptorPastEnd>},
      {"wgmma, descriptor within the pattern", "within a swizzle pattern", run_product<Mma::kDescriptorInPattern>},
      {"wgmma, descriptors differ", "has another descriptor", run_product<Mma::kDescriptorsDiffer>},
      {"wgmma by half a warpgroup", "deadlock", run_product<Mma::kHalfAWarpgroup>},
      {"wgmma, operand not written", "which nothing has written", run_product<Mma::kUnwrittenOperand>},
      {"wgmma, a thread returns before it ends", "returns while a wgmma is under way", run_product<Mma::kReturns>},
      {"wgmma chain", "", run_chain<Chain::kRight>},
      {"wgmma chain, wait too late", "shared byte", run_chain<Chain::kLateWait>},
  };
}

}  // namespace tilewright::emulator_tests
