// SPDX-License-Identifier: Apache-2.0
// Rows of the cache as operands of mma.sync, straight from global memory into registers: 16 keys at a time, each lane
// loading whole vectors of the rows whose elements it holds in the products.
//
// Lane l = 4 g + t. Scores: the lane holds keys g and g + 8 and a quarter of their rows (any order of the depth will do,
// as long as the query comes in the same one). Values: the lane holds the keys 2t, 2t+1, 2t+8, 2t+9 and an eighth of their
// rows, elements D/8 g to D/8 (g+1) - 1; two keys must meet in one word, so rows are interleaved while their codes are
// still 4 bits wide: one byte permutation for each 4 pairs.
#pragma once

#include "ops/int4_fp8_attention/cuda/codes.cuh"
#include "ops/int4_fp8_attention/cuda/rows.cuh"

namespace tilewright::int4_fp8_attention::cuda {

inline constexpr int kStepKeys = 16;
inline constexpr int kLaneValues = 4;  // keys whose values a lane holds
inline constexpr int kLaneKeys = 2;  // keys whose scores it holds: g and g + 8

// Key i of the former, within the step.
TILEWRIGHT_DEVICE int value_key(int lane, int i) { return 8 * (i / 2) + 2 * (lane % 4) + i % 2; }

inline constexpr unsigned kLowHalves = 0x5410, kHighHalves = 0x7632;  // of two words, by __byte_perm

// Where the rows of one sequence's head lie, from the first key of a chunk on.
struct Source {
  const uint8_t *k, *v, *k_scales, *v_scales;
  int64_t stride, scale_stride;  // bytes from token to token
  int row_bytes;
  bool wide_scales;  // float32, not bfloat16
  int begin, end;  // keys that may be read

  TILEWRIGHT_DEVICE bool has(int key) const { return key >= begin && key < end; }
  // Whether all 16 may be read, without looking at each.
  TILEWRIGHT_DEVICE bool has_step(int key) const { return key >= begin && key + kStepKeys <= end; }
};

// Scales of keys g and g + 8, as they are stored; value() when they are needed, so that nothing waits for the load.
struct Scales {
  uint32_t stored[kLaneKeys];

  template <bool kAll>
  TILEWRIGHT_DEVICE void load(const Source& from, const uint8_t* scales, int key, int lane) {
    const uint8_t* at = scales + (key + lane / 4) * from.scale_stride;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      stored[i] = 0;
      if (!kAll && !from.has(key + lane / 4 + 8 * i)) continue;
      const uint8_t* scale = at + 8 * i * from.scale_stride;
      stored[i] =
          from.wide_scales ? *reinterpret_cast<const uint32_t*>(scale) : *reinterpret_cast<const uint16_t*>(scale);
    }
  }
  TILEWRIGHT_DEVICE float value(const Source& from, int i) const {
    return hopper::bits_float(from.wide_scales ? stored[i] : stored[i] << 16);
  }
};

// 16 keys of an INT4 cache, heads padded to D (64 or 128) with the code of -8 against zeros of the query.
template <int D>
struct Int4Step {
  static constexpr bool kScaled = true;
  static constexpr int kKeyWords = D / 32, kValueWords = D / 64;
  uint32_t k[2][kKeyWords], v[kLaneValues][kValueWords];
  Scales key_scales, value_scales;

  TILEWRIGHT_DEVICE void load(const Source& from, int key, int lane) {
    if (from.has_step(key) && from.row_bytes == D / 2) {
      load_rows<true>(from, key, lane);
    } else {
      load_rows<false>(from, key, lane);
    }
  }
  template <bool kAll>
  TILEWRIGHT_DEVICE void load_rows(const Source& from, int key, int lane) {
    const int key_at = 4 * kKeyWords * (lane % 4), value_at = 4 * kValueWords * (lane / 4);
    const uint8_t* rows = from.k + (key + lane / 4) * from.stride + key_at;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
      for (uint32_t& word : k[b]) word = 0;
      const bool present = kAll || (from.has(key + 8 * b + lane / 4) && key_at < from.row_bytes);
      if (present) load_words<kKeyWords>(rows + 8 * b * from.stride, k[b]);
    }
    const uint8_t* values = from.v + (key + 2 * (lane % 4)) * from.stride + value_at;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
#pragma unroll
      for (uint32_t& word : v[i]) word = 0;
      const bool present = kAll || (from.has(key + value_key(lane, i)) && value_at < from.row_bytes);
      if (present) load_words<kValueWords>(values + (8 * (i / 2) + i % 2) * from.stride, v[i]);
    }
    key_scales.load<kAll>(from, from.k_scales, key, lane);
    value_scales.load<kAll>(from, from.v_scales, key, lane);
  }

  // Two steps of the depth take 8 adjacent elements of the row, from here on; word `half` of step % 2 holds two of them.
  TILEWRIGHT_DEVICE static int piece_at(int piece, int t) { return D / 4 * t + 8 * piece; }
  TILEWRIGHT_DEVICE static int in_piece(int parity, int half, int e) { return 2 * parity + half + 4 * e; }
  TILEWRIGHT_DEVICE void key_operand(int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const uint32_t word = k[i][step / 2] >> (8 * (step % 2));
      a[i] = decode_pair(word);
      a[2 + i] = decode_pair(word >> 4);
    }
  }
  // Elements 2i and 2i+1 of the lane's eighth: keys 0, 1 in words 0 and 1, keys 2, 3 in words 2 and 3.
  TILEWRIGHT_DEVICE void value_operand(int i, uint32_t (&a)[4]) const {
    const int word = i / 4, shift = 8 * (i % 2);
    const unsigned halves = i % 4 < 2 ? kLowHalves : kHighHalves;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t codes = __byte_perm(v[2 * pair][word], v[2 * pair + 1][word], halves) >> shift;
      a[2 * pair] = decode_pair(codes);
      a[2 * pair + 1] = decode_pair(codes >> 4);
    }
  }
  TILEWRIGHT_DEVICE float key_scale(const Source& from, int i) const { return key_scales.value(from, i); }
  TILEWRIGHT_DEVICE float value_scale(const Source& from, int i) const { return value_scales.value(from, i); }
  TILEWRIGHT_DEVICE void settle() {}
};

// 16 keys of a bfloat16 cache, heads padded with zeros.
template <int D>
struct BFloat16Step {
  static constexpr bool kScaled = false;
  static constexpr int kKeyWords = D / 8, kValueWords = D / 16;
  static constexpr int kVectorWords = 4;
  uint32_t k[2][kKeyWords], v[kLaneValues][kValueWords];
  float spoiled[kLaneKeys];  // NaN where a value has an element that is not finite, else 1

  TILEWRIGHT_DEVICE void load(const Source& from, int key, int lane) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int at = key + 8 * b + lane / 4;
#pragma unroll
      for (int c = 0; c < kKeyWords; c += kVectorWords) {
        const int offset = 16 * c + 16 * (lane % 4);
        load_present(from, from.k, at, offset, &k[b][c]);
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
#pragma unroll
      for (int c = 0; c < kValueWords; c += kVectorWords) {
        load_present(from, from.v, key + value_key(lane, i), 4 * (kValueWords * (lane / 4) + c), &v[i][c]);
      }
    }
  }
  TILEWRIGHT_DEVICE static void load_present(const Source& from, const uint8_t* data, int at, int offset,
                                             uint32_t* to) {
#pragma unroll
    for (int i = 0; i < kVectorWords; ++i) to[i] = 0;
    const bool present = from.has(at) && offset < from.row_bytes;
    if (present) load_words<kVectorWords>(data + at * from.stride + offset, to);
  }

  TILEWRIGHT_DEVICE static int piece_at(int piece, int t) { return 32 * piece + 8 * t; }
  TILEWRIGHT_DEVICE static int in_piece(int parity, int half, int e) { return 4 * parity + 2 * half + e; }
  TILEWRIGHT_DEVICE void key_operand(int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      a[i] = k[i][2 * step];
      a[2 + i] = k[i][2 * step + 1];
    }
  }
  TILEWRIGHT_DEVICE void value_operand(int i, uint32_t (&a)[4]) const {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      a[2 * pair] = __byte_perm(v[2 * pair][i], v[2 * pair + 1][i], kLowHalves);
      a[2 * pair + 1] = __byte_perm(v[2 * pair][i], v[2 * pair + 1][i], kHighHalves);
    }
  }
  TILEWRIGHT_DEVICE float key_scale(const Source& /*from*/, int /*i*/) const { return 1.0f; }
  TILEWRIGHT_DEVICE float value_scale(const Source& /*from*/, int i) const { return spoiled[i]; }

  // A value row with an element that is not finite becomes zeros with a scale of NaN: a weight of 0 times an infinity
  // would reach queries that do not see the key.
  TILEWRIGHT_DEVICE void settle() {
    constexpr uint32_t kLowExponent = 0x7f80u, kHighExponent = 0x7f800000u;
    const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
    uint32_t bad = 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
#pragma unroll
      for (const uint32_t word : v[i]) {
        if ((word & kLowExponent) == kLowExponent || (word & kHighExponent) == kHighExponent) bad |= 1u << i;
      }
    }
    for (int step = 4; step < kWarp; step *= 2) bad |= __shfl_xor_sync(kAllLanes, bad, step);
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
#pragma unroll
      for (uint32_t& word : v[i]) word = (bad >> i & 1u) != 0 ? 0 : word;
    }
    const uint32_t mine = __shfl_sync(kAllLanes, bad, g / 2) >> (g % 2);  // of key g, and of g + 8 two bits on
    spoiled[0] = (mine & 1u) != 0 ? not_a_number() : 1.0f;
    spoiled[1] = (mine & 4u) != 0 ? not_a_number() : 1.0f;
  }
};

}  // namespace tilewright::int4_fp8_attention::cuda
