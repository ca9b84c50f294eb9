// SPDX-License-Identifier: Apache-2.0
// The inverse of I + L, L strictly lower triangular [C, C], by forward substitution in float32: a column of the inverse
// a thread, in registers. Rounded once, when it is stored.
#pragma once

#include "hopper/hopper.h"
#include "ops/linear_attention/cuda/problem.h"

namespace tilewright::linear_attention::cuda {

// L is stored by columns, so that a thread reads four rows at once; the padding spreads the columns over the banks.
inline constexpr int kMatrixStride = kChunk + 4;
inline constexpr int kMatrixFloats = kChunk * kMatrixStride;

struct alignas(16) FourFloats {
  float x[4];
};

// Columns kFirst + lane of the inverse, by one warp. Rows above kFirst of these columns are zero.
template <class In, int kFirst>
TILEWRIGHT_DEVICE void invert_columns(const float* matrix, void* inverse) {
  using Tile = hopper::Tile<In, kChunk, kChunk, hopper::Swizzle::k128>;
  constexpr int kRows = kChunk - kFirst;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Below the diagonal; on it is 1, which has already taken its column of L off the rows below.
  float x[kRows];
  const float* own = matrix + (kFirst + lane) * kMatrixStride + kFirst;
#pragma unroll
  for (int i = 0; i < kRows; i += 4) {
    const FourFloats four = *reinterpret_cast<const FourFloats*>(own + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[i + e] = -four.x[e];
  }
#pragma unroll
  for (int j = 0; j < kRows - 1; ++j) {
    // x[j] is final: what it contributes to the rows below.
    const float* column = matrix + (kFirst + j) * kMatrixStride + kFirst;
#pragma unroll
    for (int i = (j + 1) / 4 * 4; i < kRows; i += 4) {
      const FourFloats four = *reinterpret_cast<const FourFloats*>(column + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (i + e > j) x[i + e] = fmaf(-four.x[e], x[j], x[i + e]);
      }
    }
  }
  // The swizzle repeats every eight rows: so many addresses, the rest are constants added to them.
  const auto at = [&](int row) {
    return reinterpret_cast<In*>(static_cast<char*>(inverse) + Tile::offset(row % 8, kFirst + lane) + row / 8 * 1024);
  };
#pragma unroll
  for (int i = 0; i < kFirst; ++i) *at(i) = hopper::from_float<In>(0.0f);
#pragma unroll
  for (int i = 0; i < kRows; ++i) *at(kFirst + i) = hopper::from_float<In>(i == lane ? 1.0f : x[i]);
}

}  // namespace tilewright::linear_attention::cuda
