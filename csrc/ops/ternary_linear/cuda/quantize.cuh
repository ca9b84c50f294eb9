// SPDX-License-Identifier: Apache-2.0
// Activations to INT8, one block a token; and the two small kernels that only move bytes.
#pragma once

#include "ops/ternary_linear/activation.h"
#include "ops/ternary_linear/cuda/common.cuh"

namespace tilewright::ternary_linear::cuda {

inline constexpr int kQuantizeThreads = 256;
inline constexpr int kPieceCols = 16;   // codes of one store

// Sixteen values from column k on, zero past K. Wide loads where rows start at multiples of 16 bytes.
template <class T>
TILEWRIGHT_DEVICE void load_piece(const T* row, int64_t k, int64_t columns, bool aligned, float (&values)[kPieceCols]) {
  constexpr int kPerLoad = 16 / static_cast<int>(sizeof(T));
  if (aligned && k + kPieceCols <= columns) {
#pragma unroll
    for (int i = 0; i < kPieceCols / kPerLoad; ++i) {
      const hopper::U128 raw = hopper::load_16(row + k + i * kPerLoad);
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4) {
          values[i * kPerLoad + w] = hopper::bits_float(words[w]);
        } else {
          hopper::unpack_pair<T>(words[w], values[i * kPerLoad + 2 * w], values[i * kPerLoad + 2 * w + 1]);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPieceCols; ++i) values[i] = k + i < columns ? hopper::to_float(row[k + i]) : 0.0f;
}

// Largest magnitude of the token as the bits of a float: from 0x7f800000 on something is not finite.
template <class T>
TILEWRIGHT_DEVICE uint32_t largest_bits(const T* row, int64_t columns, bool aligned) {
  uint32_t largest = 0;
  for (int64_t k = threadIdx.x * kPieceCols; k < columns; k += kQuantizeThreads * kPieceCols) {
    float values[kPieceCols];
    load_piece(row, k, columns, aligned, values);
#pragma unroll
    for (int i = 0; i < kPieceCols; ++i) largest = max(largest, hopper::float_bits(values[i]) & 0x7fffffffu);
  }
  auto* shared = reinterpret_cast<uint32_t*>(hopper::shared_memory());
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int w = 0; w < kQuantizeThreads / 32; ++w) largest = max(largest, shared[w]);
  return largest;
}

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(const __grid_constant__ Quantize params) {
  // In this order: when the next kernel may start, everything before this one is over, the weights' last writer too.
  hopper::wait_for_previous_kernel();
  hopper::allow_next_kernel();
  const int64_t token = blockIdx.x;
  const T* row = static_cast<const T*>(params.x) + token * params.k;
  const bool aligned = params.k * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(params.x) % 16 == 0;
  const uint32_t largest = largest_bits(row, params.k, aligned);
  const bool finite = largest < 0x7f800000u;
  const float absmax = hopper::bits_float(largest);
  const float scale = (absmax > kLeastAbsmax ? absmax : kLeastAbsmax) / kInt8Limit;
  if (threadIdx.x == 0) params.scales[token] = finite ? scale : hopper::bits_float(0x7fc00000u);
  for (int64_t i = token * kQuantizeThreads + threadIdx.x; i < params.ticket_count; i += params.m * kQuantizeThreads) {
    params.tickets[i] = 0;
  }
  int8_t* codes = params.codes + token * params.stride;
  for (int64_t k = threadIdx.x * kPieceCols; k < params.stride; k += kQuantizeThreads * kPieceCols) {
    float values[kPieceCols];
    load_piece(row, k, params.k, aligned, values);
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int code = finite ? __float2int_rn(values[4 * w + i] / scale) : 0;
        words[w] |= (static_cast<uint32_t>(code) & 0xffu) << (8 * i);
      }
    }
    hopper::store_16(codes + k, {words[0], words[1], words[2], words[3]});
  }
}

struct PadParams {
  const int8_t* x;
  int8_t* padded;
  int64_t m, k, stride;
};

__global__ void __launch_bounds__(256) pad_kernel(const __grid_constant__ PadParams params) {
  hopper::wait_for_previous_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= params.m * params.stride) return;
  const int64_t token = i / params.stride, k = i % params.stride;
  params.padded[i] = k < params.k ? params.x[token * params.k + k] : int8_t{0};
}

struct UnpackParams {
  const uint8_t* payload;
  int8_t* out;
  int64_t n, k;
};

__global__ void __launch_bounds__(256) unpack_kernel(const __grid_constant__ UnpackParams params) {
  hopper::wait_for_previous_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= params.n * params.k) return;
  const format::TernaryPlace place = TernaryMma2::place(params.k, i / params.k, i % params.k);
  const int digit = (params.payload[place.byte] >> place.shift) & 3;
  params.out[i] = static_cast<int8_t>(digit == 3 ? -1 : digit);
}

}  // namespace tilewright::ternary_linear::cuda
