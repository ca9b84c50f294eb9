// SPDX-License-Identifier: Apache-2.0
// Rows of the cache as operands of mma.sync, straight from global memory into registers: 16 keys at a time, each lane
// loading whole vectors of the rows whose elements it holds in the products.
//
// Lane l = 4 g + t. Scores: the lane holds keys g and g + 8 and a quarter of their rows (any order of the depth will
// do, as long as the query comes in the same one). Values: the lane holds the keys 2t, 2t+1, 2t+8, 2t+9 and an eighth
// of their rows, elements D/8 g to D/8 (g+1) - 1; two keys must meet in one word, so rows are interleaved while their
// codes are still 4 bits wide: one byte permutation for each 4 pairs.
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
template <int kGroups>
struct Scales {
  uint32_t stored[kGroups][kLaneKeys];

  template <bool kAll>
  TILEWRIGHT_DEVICE void load(const Source& from, const uint8_t* scales, int key, int lane) {
    const uint8_t* at = scales + (key + lane / 4) * from.scale_stride;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const bool present = kAll || from.has(key + lane / 4 + 8 * i);
      const uint8_t* scale = at + 8 * i * from.scale_stride;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        stored[group][i] = 0;
        if (!present) continue;
        stored[group][i] = from.wide_scales ? reinterpret_cast<const uint32_t*>(scale)[group]
                                            : reinterpret_cast<const uint16_t*>(scale)[group];
      }
    }
  }
  TILEWRIGHT_DEVICE float value(const Source& from, int group, int i) const {
    return hopper::bits_float(from.wide_scales ? stored[group][i] : stored[group][i] << 16);
  }
};

// 16 keys of an INT4 cache, heads padded to D (64, 128, or 256 in two groups) with the code of -8 against zeros of the
// query. Within a group a lane has adjacent elements.
template <int D>
struct Int4Step {
  static constexpr int kAhead = D <= 128 ? 2 : 1;  // steps that are loaded at once
  static constexpr int kGroups = D <= format::Int4Kv::kGroup ? 1 : D / format::Int4Kv::kGroup;
  static constexpr int kGroupDim = D / kGroups, kGroupBytes = kGroupDim / 2;
  static constexpr int kKeyWords = kGroupDim / 32, kValueWords = kGroupDim / 64;  // of one group
  static constexpr int kLaneElements = kGroupDim / 8;  // of a value and group
  uint32_t k[kLaneKeys][kGroups][kKeyWords], v[kLaneValues][kGroups][kValueWords];
  Scales<kGroups> key_scales, value_scales;

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
    const uint8_t* rows = from.k + (key + lane / 4) * from.stride;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const bool present = kAll || from.has(key + 8 * i + lane / 4);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        load_group<kAll, kKeyWords>(from, rows + 8 * i * from.stride, present, key_at + group * kGroupBytes,
                                    k[i][group]);
      }
    }
    const uint8_t* values = from.v + (key + 2 * (lane % 4)) * from.stride;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const bool present = kAll || from.has(key + value_key(lane, i));
      const uint8_t* row = values + (8 * (i / 2) + i % 2) * from.stride;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        load_group<kAll, kValueWords>(from, row, present, value_at + group * kGroupBytes, v[i][group]);
      }
    }
    key_scales.template load<kAll>(from, from.k_scales, key, lane);
    value_scales.template load<kAll>(from, from.v_scales, key, lane);
  }
  template <bool kAll, int kWords>
  TILEWRIGHT_DEVICE static void load_group(const Source& from, const uint8_t* row, bool present, int at,
                                           uint32_t (&words)[kWords]) {
#pragma unroll
    for (uint32_t& word : words) word = 0;
    if (kAll || (present && at < from.row_bytes)) load_words<kWords>(row + at, words);
  }

  // Two steps of the depth take 8 adjacent elements of the row, from here on; word `half` of step % 2 holds two of
  // them.
  TILEWRIGHT_DEVICE static int piece_at(int piece, int t) {
    return piece / kKeyWords * kGroupDim + kGroupDim / 4 * t + 8 * (piece % kKeyWords);
  }
  TILEWRIGHT_DEVICE static int in_piece(int parity, int half, int e) { return 2 * parity + half + 4 * e; }
  TILEWRIGHT_DEVICE static constexpr int key_group(int step) { return step / 2 / kKeyWords; }
  TILEWRIGHT_DEVICE void key_operand(int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const uint32_t word = k[i][key_group(step)][step / 2 % kKeyWords] >> (8 * (step % 2));
      a[i] = decode_pair(word);
      a[2 + i] = decode_pair(word >> 4);
    }
  }
  // Block i of 16 rows of v^T: the lane has elements value_at and value_at + 1, of keys 0, 1 in words 0 and 1, of keys
  // 2, 3 in words 2 and 3.
  TILEWRIGHT_DEVICE static constexpr int value_group(int i) { return 2 * i / kLaneElements; }
  TILEWRIGHT_DEVICE static int value_at(int i, int g) {
    return value_group(i) * kGroupDim + kLaneElements * g + 2 * i % kLaneElements;
  }
  TILEWRIGHT_DEVICE void value_operand(int i, uint32_t (&a)[4]) const {
    const int group = value_group(i), code = 2 * i % kLaneElements, word = code / 8, shift = 4 * (code % 4);
    const unsigned halves = code % 8 < 4 ? kLowHalves : kHighHalves;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t codes = __byte_perm(v[2 * pair][group][word], v[2 * pair + 1][group][word], halves) >> shift;
      a[2 * pair] = decode_pair(codes);
      a[2 * pair + 1] = decode_pair(codes >> 4);
    }
  }
  TILEWRIGHT_DEVICE float key_scale(const Source& from, int group, int i) const {
    return key_scales.value(from, group, i);
  }
  TILEWRIGHT_DEVICE float value_scale(const Source& from, int group, int i) const {
    return value_scales.value(from, group, i);
  }
  TILEWRIGHT_DEVICE void settle() {}
};

// 16 keys of a bfloat16 cache, heads padded with zeros.
template <int D>
struct BFloat16Step {
  static constexpr int kAhead = 1;
  static constexpr int kGroups = 1;
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
  TILEWRIGHT_DEVICE static constexpr int key_group(int /*step*/) { return 0; }
  TILEWRIGHT_DEVICE static constexpr int value_group(int /*i*/) { return 0; }
  TILEWRIGHT_DEVICE static int value_at(int i, int g) { return D / 8 * g + 2 * i; }
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
  TILEWRIGHT_DEVICE float key_scale(const Source& /*from*/, int /*group*/, int /*i*/) const { return 1.0f; }
  TILEWRIGHT_DEVICE float value_scale(const Source& /*from*/, int /*group*/, int i) const { return spoiled[i]; }

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
