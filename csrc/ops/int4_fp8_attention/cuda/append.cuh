// SPDX-License-Identifier: Apache-2.0
// New tokens into the cache: one warp quantizes one row (a token and head of k, or of v) with the operations of
// cpu/append.h, hence to the same bits. A second kernel advances the lengths once every row has been placed.
#pragma once

#include "ops/int4_fp8_attention/cuda/rows.cuh"

namespace tilewright::int4_fp8_attention::cuda {

inline constexpr int kAppendWarps = 8;

// format::float_to_bf16 for the device: the bits of a NaN too are those of the CPU.
TILEWRIGHT_DEVICE uint16_t rounded_bf16(float value) {
  const uint32_t bits = hopper::float_bits(value);
  if ((bits & kMagnitude) > kInfinity) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
TILEWRIGHT_DEVICE int rounded_code(float x, float scale) {
  constexpr float kRound = 12582912.0f;
  constexpr int kRoundBits = 0x4b400000, kMax = format::Int4Kv::kMaxCode;
  if (!(scale < hopper::bits_float(kInfinity))) return 0;
  const int code = static_cast<int>(hopper::float_bits(x / scale + kRound)) - kRoundBits;
  return code < -kMax ? -kMax : code > kMax ? kMax : code;
}

// One group of one row: lane i holds bytes i and i + 32 of its 64.
TILEWRIGHT_DEVICE void quantize_group(const Append& a, const Tokens& x, int64_t from, int first, uint8_t* row,
                                      uint8_t* scales) {
  constexpr int kBytes = format::Int4Kv::kGroup / 2 / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, head_dim = static_cast<int>(a.cache.head_dim);
  float value[kBytes][2];
  uint32_t largest = 0;
  for (int i = 0; i < kBytes; ++i) {
    for (int e = 0; e < 2; ++e) {
      const int d = first + 2 * (lane + kWarp * i) + e;
      value[i][e] = d < head_dim ? element(x.data, x.type, from + d) : 0.0f;
      const uint32_t bits = magnitude_bits(value[i][e]);
      largest = bits > largest ? bits : largest;
    }
  }
  largest = warp_max(largest);
  float scale = fmaxf(hopper::bits_float(largest), format::Int4Kv::kLeastAbsmax) / format::Int4Kv::kMaxCode;
  if (largest >= kInfinity) scale = not_a_number();
  const int group = first / format::Int4Kv::kGroup;
  if (a.cache.scale_type == format::ScaleType::kFloat32) {
    if (lane == 0) reinterpret_cast<float*>(scales)[group] = scale;
  } else {
    const bf16 stored{rounded_bf16(scale)};
    if (lane == 0) reinterpret_cast<bf16*>(scales)[group] = stored;
    scale = hopper::to_float(stored);
  }
  for (int i = 0; i < kBytes; ++i) {
    const int d = first + 2 * (lane + kWarp * i);
    const int even = rounded_code(value[i][0], scale), odd = rounded_code(value[i][1], scale);
    if (d < head_dim) row[d / 2] = format::Int4Kv::pair(even, odd);
  }
}

TILEWRIGHT_DEVICE void append_row(const Append& a, const Tokens& x, uint8_t* data, uint8_t* scales, int64_t from,
                                  int64_t data_offset, int64_t scale_offset) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, head_dim = static_cast<int>(a.cache.head_dim);
  if (a.cache.format == CacheFormat::kBFloat16) {
    auto* row = reinterpret_cast<bf16*>(data + data_offset);
    for (int d = lane; d < head_dim; d += kWarp) row[d] = bf16{rounded_bf16(element(x.data, x.type, from + d))};
    return;
  }
  for (int first = 0; first < head_dim; first += format::Int4Kv::kGroup) {
    quantize_group(a, x, from, first, data + data_offset, scales + scale_offset);
  }
}

// A grid of one warp for each token, head, and k or v.
__global__ void __launch_bounds__(kAppendWarps* kWarp) append_rows(const __grid_constant__ Append a) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / kWarp;
  const int row = static_cast<int>(warp / 2), heads = static_cast<int>(a.cache.heads);
  const int head = row % heads, t = row / heads;
  if (t >= smaller(a.tokens, a.cu_seqlens[a.sequences])) return;
  const int s = sequence_with(a.cu_seqlens, a.sequences, t);
  const int64_t held = a.lengths[s], fresh = a.cu_seqlens[s + 1] - a.cu_seqlens[s];
  if (held < 0 || held + fresh > a.cache.capacity) return;
  const int64_t position = held + t - a.cu_seqlens[s];
  if (position < 0 || position >= a.cache.capacity) return;  // offsets that fall
  const bool is_k = warp % 2 == 0;
  const Tokens& x = is_k ? a.k : a.v;
  append_row(a, x, is_k ? a.cache.k : a.cache.v, is_k ? a.cache.k_scales : a.cache.v_scales,
             t * x.token_stride + head * x.head_stride, data_at(a.cache, s, head) + position * a.cache.data.token,
             scales_at(a.cache, s, head) + position * a.cache.scales.token);
}

__global__ void __launch_bounds__(kWarp* kAppendWarps) advance_lengths(const __grid_constant__ Append a) {
  hopper::wait_for_previous_kernel();
  const int64_t s = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s >= a.sequences) return;
  const int64_t held = a.lengths[s], fresh = a.cu_seqlens[s + 1] - a.cu_seqlens[s];
  const bool fits = held >= 0 && fresh >= 0 && held + fresh <= a.cache.capacity;
  a.lengths[s] = fits ? held + fresh : -1;
}

}  // namespace tilewright::int4_fp8_attention::cuda
