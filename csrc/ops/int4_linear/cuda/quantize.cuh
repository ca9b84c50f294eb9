// SPDX-License-Identifier: Apache-2.0
// Tokens to e4m3, one block a token: find the largest magnitude, then round. A thread takes 16 columns at a time, which it
// writes as 16 bytes; K is padded with zeros to what the products read.
#pragma once

#include "hopper/hopper.h"
#include "ops/int4_linear/activation.h"
#include "ops/int4_linear/cuda/launch.h"

namespace tilewright::int4_linear {

inline constexpr int kQuantizeThreads = 256;
inline constexpr int kQuantizeWarps = kQuantizeThreads / 32;
inline constexpr int kPiece = 16;  // columns of a thread; every `sub` is a multiple of it

// Columns [k, k + 16) of a row as floats, zero behind K.
template <class T>
TILEWRIGHT_DEVICE void load_piece(const T* row, int64_t k, int64_t columns, float (&values)[kPiece]) {
  constexpr int kPerLoad = 16 / static_cast<int>(sizeof(T));
  if (k + kPiece <= columns && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kPiece; i += kPerLoad) {
      const hopper::U128 raw = hopper::load_16(row + k + i);
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4) {
          values[i + w] = hopper::bits_float(words[w]);
        } else {
          hopper::unpack_pair<T>(words[w], values[i + 2 * w], values[i + 2 * w + 1]);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) values[i] = k + i < columns ? hopper::to_float(row[k + i]) : 0.0f;
}

inline constexpr float kLargestFloat = 3.402823466e38f;
inline constexpr float kInfinity = __builtin_huge_valf();

// Sixteen e4m3 codes.
TILEWRIGHT_DEVICE hopper::U128 round_piece(const float (&values)[kPiece], float divisor) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float* v = values + 4 * w;
    words[w] = hopper::pack_e4m3x4(v[0] / divisor, v[1] / divisor, v[2] / divisor, v[3] / divisor);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Their sum.
TILEWRIGHT_DEVICE float sum_of_piece(const hopper::U128& codes) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float values[4];
    hopper::unpack_e4m3x4(words[w], values);
    sum += (values[0] + values[1]) + (values[2] + values[3]);
  }
  return sum;
}

// The largest magnitude so far with one more value; infinite from the first value on that is not finite.
TILEWRIGHT_DEVICE float with_magnitude(float largest, float value) {
  const float magnitude = fabsf(value);
  return magnitude <= kLargestFloat ? fmaxf(largest, magnitude) : kInfinity;
}

// One number of each warp, to every thread.
TILEWRIGHT_DEVICE void share(float* slot, float of_warp) {
  if (threadIdx.x % 32 == 0) slot[threadIdx.x / 32] = of_warp;
  __syncthreads();
}

TILEWRIGHT_DEVICE float block_largest(float mine) {
  auto* slot = reinterpret_cast<float*>(hopper::shared_memory());
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) mine = fmaxf(mine, __shfl_xor_sync(0xffffffffu, mine, offset));
  share(slot, mine);
  float all = 0.0f;
  for (int w = 0; w < kQuantizeWarps; ++w) all = fmaxf(all, slot[w]);
  return all;
}

// Always added in the same order.
TILEWRIGHT_DEVICE float block_sum(float mine) {
  auto* slot = reinterpret_cast<float*>(hopper::shared_memory()) + kQuantizeWarps;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, offset);
  share(slot, mine);
  float all = 0.0f;
  for (int w = 0; w < kQuantizeWarps; ++w) all += slot[w];
  return all;
}

// A token as it is to be rounded: x, or what the layer before would make of it.
template <class T>
struct Token {
  const T* row;
  const T* gate;  // null, or silu(gate) multiplies x
  const T* norm;  // null, or x is divided by its root mean square and multiplied by this
  float inverse_rms;

  TILEWRIGHT_DEVICE Token(const QuantizeProblem& p, int64_t token)
      : row(static_cast<const T*>(p.x) + token * p.k),
        gate(p.gate == nullptr ? nullptr : static_cast<const T*>(p.gate) + token * p.k),
        norm(static_cast<const T*>(p.norm)),
        inverse_rms(1.0f) {}

  TILEWRIGHT_DEVICE void load(int64_t k, int64_t columns, float (&values)[kPiece]) const {
    load_piece(row, k, columns, values);
    if (norm != nullptr) {
      float weights[kPiece];
      load_piece(norm, k, columns, weights);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) values[i] = values[i] * inverse_rms * weights[i];
    }
    if (gate != nullptr) {
      float gates[kPiece];
      load_piece(gate, k, columns, gates);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) values[i] *= gates[i] / (1.0f + expf(-gates[i]));
    }
  }
};

template <class T>
TILEWRIGHT_DEVICE float find_inverse_rms(const T* row, const QuantizeProblem& p) {
  float squares = 0.0f;
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kPiece; k < p.k; k += kQuantizeThreads * kPiece) {
    float values[kPiece];
    load_piece(row, k, p.k, values);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) squares = fmaf(values[i], values[i], squares);
  }
  return 1.0f / sqrtf(block_sum(squares) / static_cast<float>(p.k) + p.eps);
}

template <class T>
TILEWRIGHT_DEVICE float token_largest(const Token<T>& token, const QuantizeProblem& p) {
  float mine = 0.0f;
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kPiece; k < p.k; k += kQuantizeThreads * kPiece) {
    float values[kPiece];
    token.load(k, p.k, values);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) mine = with_magnitude(mine, values[i]);
  }
  return block_largest(mine);
}

// The sums of `sub` neighbouring codes: sub / 16 neighbouring threads, always joined in the same order.
TILEWRIGHT_DEVICE void store_sums(const QuantizeProblem& p, int64_t token, int64_t k, float sum) {
  for (int offset = 1; offset < p.sub / kPiece; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (k < p.padded_k && k % p.sub == 0) p.sums[k / p.sub * p.sums_stride + token] = sum;
}

template <class T>
TILEWRIGHT_DEVICE void write_codes(const Token<T>& source, const QuantizeProblem& p, int64_t token, float divisor,
                                   bool zero) {
  for (int64_t first = 0; first < p.padded_k; first += kQuantizeThreads * kPiece) {
    const int64_t k = first + static_cast<int64_t>(threadIdx.x) * kPiece;
    float sum = 0.0f;
    if (k < p.padded_k) {
      hopper::U128 codes{0, 0, 0, 0};
      if (!zero) {
        float values[kPiece];
        source.load(k, p.k, values);
        codes = round_piece(values, divisor);
        sum = sum_of_piece(codes);
      }
      hopper::store_16(p.codes + token * p.padded_k + k, codes);
    }
    if (p.sums != nullptr) store_sums(p, token, k, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(const __grid_constant__ QuantizeProblem p) {
  hopper::wait_for_previous_kernel();
  hopper::allow_next_kernel();  // whose weights may come now: all that is earlier is over
  const int64_t token = blockIdx.x;
  Token<T> source(p, token);
  if (p.norm != nullptr) source.inverse_rms = find_inverse_rms(source.row, p);
  const float largest = token_largest(source, p);
  const bool finite = largest <= kLargestFloat;
  const float scale = largest / kFp8Limit;
  const float divisor = scale == 0.0f ? 1.0f : scale;
  if (threadIdx.x == 0) p.scales[token] = finite ? divisor : hopper::bits_float(0x7fc00000u);
  write_codes(source, p, token, divisor, !finite);
  if (token == 0) {
    for (int64_t i = threadIdx.x; i < p.counter_count; i += kQuantizeThreads) p.counters[i] = 0;
  }
}

}  // namespace tilewright::int4_linear
