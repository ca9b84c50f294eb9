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

inline constexpr int kLaneCodes = 4;  // adjacent ones that a lane has of a group of 128

// One group of one row. The lane's four elements become two bytes, the group's scale one number.
TILEWRIGHT_DEVICE void quantize_group(const Cache& c, const float (&value)[kLaneCodes], int first, uint8_t* row,
                                      uint8_t* scales) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, head_dim = static_cast<int>(c.head_dim);
  uint32_t largest = 0;
#pragma unroll
  for (const float x : value) largest = larger(largest, magnitude_bits(x));
  largest = warp_max(largest);
  float scale = fmaxf(hopper::bits_float(largest), format::Int4Kv::kLeastAbsmax) / format::Int4Kv::kMaxCode;
  if (largest >= kInfinity) scale = not_a_number();
  const int group = first / format::Int4Kv::kGroup;
  if (c.scale_type == format::ScaleType::kFloat32) {
    if (lane == 0) reinterpret_cast<float*>(scales)[group] = scale;
  } else {
    const bf16 stored{rounded_bf16(scale)};
    if (lane == 0) reinterpret_cast<bf16*>(scales)[group] = stored;
    scale = hopper::to_float(stored);
  }
  const int d = first + kLaneCodes * lane;
  const uint8_t pair[2] = {format::Int4Kv::pair(rounded_code(value[0], scale), rounded_code(value[1], scale)),
                           format::Int4Kv::pair(rounded_code(value[2], scale), rounded_code(value[3], scale))};
  uint8_t* to = row + d / 2;
  if (d + 2 < head_dim && reinterpret_cast<uintptr_t>(to) % 2 == 0) {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(pair[0] | pair[1] << 8);
    return;
  }
  if (d < head_dim) to[0] = pair[0];
  if (d + 2 < head_dim) to[1] = pair[1];
}

// Where one row of k or v comes from and goes to.
struct AppendRow {
  Tokens x;
  int64_t from;  // elements
  uint8_t *data, *scales;
};

// The lane's elements of the whole row: piece g of 4 are those of group g.
using RowPieces = RawRow<kMaxGroups, kLaneCodes>;

TILEWRIGHT_DEVICE void load_row(const Cache& c, const AppendRow& row, RowPieces& raw) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, head_dim = static_cast<int>(c.head_dim);
  const bool aligned = in_vectors(row.x) && head_dim % kLaneCodes == 0;
#pragma unroll
  for (int g = 0; g < kMaxGroups; ++g) {
    const int d = format::Int4Kv::kGroup * g + kLaneCodes * lane;
    raw.load(row.x, aligned, g, smaller(kLaneCodes, head_dim - d), row.from + d);
  }
}

TILEWRIGHT_DEVICE void store_row(const Cache& c, const AppendRow& row, const RowPieces& raw) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, head_dim = static_cast<int>(c.head_dim);
#pragma unroll
  for (int g = 0; g < kMaxGroups; ++g) {
    const int first = format::Int4Kv::kGroup * g;
    if (first >= head_dim) return;
    float value[kLaneCodes];
    raw.values(row.x.type, g, value);
    if (c.format == CacheFormat::kInt4) {
      quantize_group(c, value, first, row.data, row.scales);
      continue;
    }
#pragma unroll
    for (int e = 0; e < kLaneCodes; ++e) {
      const int d = first + kLaneCodes * lane + e;
      if (d < head_dim) reinterpret_cast<bf16*>(row.data)[d] = bf16{rounded_bf16(value[e])};
    }
  }
}

// A grid of one warp for each token and head; k and v are read together.
__global__ void __launch_bounds__(kAppendWarps* kWarp) append_rows(const __grid_constant__ Append a) {
  const int row = static_cast<int>(blockIdx.x * kAppendWarps + threadIdx.x / kWarp);
  const int heads = static_cast<int>(a.cache.heads), head = row % heads, t = row / heads;
  if (t >= smaller(a.tokens, a.cu_seqlens[a.sequences])) return;
  const int s = sequence_with(a.cu_seqlens, a.sequences, t);
  const int64_t held = a.lengths[s], start = a.cu_seqlens[s], fresh = a.cu_seqlens[s + 1] - start;
  const int64_t position = held + t - start;
  if (held < 0 || held + fresh > a.cache.capacity || position < 0 || position >= a.cache.capacity) return;
  const int64_t data = data_at(a.cache, s, head) + position * a.cache.data.token;
  const int64_t scales = scales_at(a.cache, s, head) + position * a.cache.scales.token;
  const AppendRow k{a.k, t * a.k.token_stride + head * a.k.head_stride, a.cache.k + data, a.cache.k_scales + scales};
  const AppendRow v{a.v, t * a.v.token_stride + head * a.v.head_stride, a.cache.v + data, a.cache.v_scales + scales};
  RowPieces raw_k, raw_v;
  load_row(a.cache, k, raw_k);
  load_row(a.cache, v, raw_v);
  store_row(a.cache, k, raw_k);
  store_row(a.cache, v, raw_v);
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
