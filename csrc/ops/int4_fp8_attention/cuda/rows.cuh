// SPDX-License-Identifier: Apache-2.0
// What the attention kernels share: finding a sequence, reading and quantizing queries, writing rows of the output.
#pragma once

#include <limits>

#include "hopper/hopper.h"
#include "ops/int4_fp8_attention/cuda/schedule.h"

namespace tilewright::int4_fp8_attention::cuda {

using hopper::bf16;
using hopper::f16;

inline constexpr int kMaxGroups = static_cast<int>(kMaxHeadDim) / format::Int4Kv::kGroup;  // scales of a row

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kWarp = 32;
inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kFp8Limit = 448.0f;
inline constexpr uint32_t kInfinity = 0x7f800000u, kMagnitude = 0x7fffffffu, kNan = 0x7fc00000u;

TILEWRIGHT_DEVICE float lowest() { return hopper::bits_float(kInfinity | 0x80000000u); }
TILEWRIGHT_DEVICE float not_a_number() { return hopper::bits_float(kNan); }

TILEWRIGHT_DEVICE Sequence sequence_at(const Attention& p, int64_t s) {
  return sequence_of(p, p.cu_seqlens[s], p.cu_seqlens[s + 1], p.lengths[s]);
}

// The last sequence that starts at or before token t, of those that have tokens; t is below cu_seqlens[S].
TILEWRIGHT_DEVICE int sequence_with(const int64_t* cu_seqlens, int64_t sequences, int64_t t) {
  int low = 0, high = static_cast<int>(sequences);  // cu_seqlens[low] <= t < cu_seqlens[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu_seqlens[middle] <= t) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// An item's sequence, and its index among those of the sequence; sequence -1: there is no such item.
struct Place {
  int sequence, index;
};

// Items lie sequence by sequence; Count::of gives how many a sequence has. All lanes of a warp call it and get the
// same.
template <class Count>
TILEWRIGHT_DEVICE Place find_item(const Attention& p, int index) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int before = 0;
  for (int first = 0; first < p.sequences; first += kWarp) {
    const int count = first + lane < p.sequences ? Count::of(p, sequence_at(p, first + lane)) : 0;
    int end = count;
    for (int step = 1; step < kWarp; step *= 2) {
      const int lower = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += lower;
    }
    const unsigned behind = __ballot_sync(kAllLanes, before + end > index);
    if (behind != 0) {
      const int source = __ffs(static_cast<int>(behind)) - 1;
      return {first + source, index - before - __shfl_sync(kAllLanes, end - count, source)};
    }
    before += __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  return {-1, 0};
}

// All of them.
template <class Count>
TILEWRIGHT_DEVICE int count_items(const Attention& p) {
  int count = 0;
  for (int s = static_cast<int>(threadIdx.x) % kWarp; s < p.sequences; s += kWarp) {
    count += Count::of(p, sequence_at(p, s));
  }
  for (int step = kWarp / 2; step > 0; step /= 2) count += __shfl_xor_sync(kAllLanes, count, step);
  return count;
}

// Where share `index` of so many equal contiguous ones begins.
TILEWRIGHT_DEVICE int share_of(int items, int index, int shares) {
  return static_cast<int>(static_cast<int64_t>(items) * index / shares);
}

TILEWRIGHT_DEVICE float element(const void* data, Element type, int64_t at) {
  if (type == Element::kFloat32) return static_cast<const float*>(data)[at];
  if (type == Element::kBFloat16) return hopper::to_float(static_cast<const bf16*>(data)[at]);
  return hopper::to_float(static_cast<const f16*>(data)[at]);
}

TILEWRIGHT_DEVICE void set_element(void* data, Element type, int64_t at, float value) {
  if (type == Element::kFloat32) {
    static_cast<float*>(data)[at] = value;
  } else if (type == Element::kBFloat16) {
    static_cast<bf16*>(data)[at] = hopper::from_float<bf16>(value);
  } else {
    static_cast<f16*>(data)[at] = hopper::from_float<f16>(value);
  }
}

// Element d of query (t, h), its sign that of the softmax scale; 0 past the head.
TILEWRIGHT_DEVICE float query_element(const Attention& p, int64_t t, int64_t h, int d) {
  if (d >= p.cache.head_dim) return 0.0f;
  const float q = element(p.q.data, p.q.type, t * p.q.token_stride + h * p.q.head_stride + d);
  return p.scale < 0.0f ? -q : q;
}

// Whether rows may be read in vectors.
TILEWRIGHT_DEVICE bool in_vectors(const Tokens& x) {
  const int64_t strides = (x.token_stride | x.head_stride) * element_bytes(x.type);
  return reinterpret_cast<uintptr_t>(x.data) % kVectorBytes == 0 && strides % kVectorBytes == 0;
}

template <int kWords>
struct alignas(4 * kWords) Vector {
  uint32_t word[kWords];
};

template <int kWords>
TILEWRIGHT_DEVICE void load_words(const uint8_t* from, uint32_t* to) {
  const auto vector = *reinterpret_cast<const Vector<kWords>*>(from);
#pragma unroll
  for (int i = 0; i < kWords; ++i) to[i] = vector.word[i];
}

// Pieces of kLength (4 or 8) adjacent elements of one row, as they are stored. Loading and converting are apart, so
// that all loads are under way before the first is waited for.
template <int kPieces, int kLength>
struct RawRow {
  uint32_t words[kPieces][kLength];  // of 16-bit elements the first half

  // Piece i, from element `at` of x on: `count` elements, then zeros. aligned: pieces are whole vectors, or not there.
  TILEWRIGHT_DEVICE void load(const Tokens& x, bool aligned, int i, int count, int64_t at) {
#pragma unroll
    for (uint32_t& word : words[i]) word = 0;
    if (count <= 0) return;
    const auto* from = static_cast<const uint8_t*>(x.data) + at * element_bytes(x.type);
    if (x.type == Element::kFloat32) {
      if (aligned) {
#pragma unroll
        for (int w = 0; w < kLength; w += 4) load_words<4>(from + 4 * w, &words[i][w]);
      } else {
#pragma unroll
        for (int w = 0; w < kLength; ++w) {
          if (w < count) load_words<1>(from + 4 * w, &words[i][w]);
        }
      }
    } else if (aligned) {
      load_words<kLength / 2>(from, words[i]);
    } else {
#pragma unroll
      for (int w = 0; w < kLength; ++w) {
        if (w >= count) continue;
        words[i][w / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[w]) << (16 * (w % 2));
      }
    }
  }
  TILEWRIGHT_DEVICE void values(Element type, int i, float (&value)[kLength]) const {
#pragma unroll
    for (int w = 0; w < kLength; w += 2) {
      if (type == Element::kFloat32) {
        value[w] = hopper::bits_float(words[i][w]);
        value[w + 1] = hopper::bits_float(words[i][w + 1]);
      } else if (type == Element::kBFloat16) {
        hopper::unpack_bf16x2(words[i][w / 2], value[w], value[w + 1]);
      } else {
        hopper::unpack_f16x2(words[i][w / 2], value[w], value[w + 1]);
      }
    }
  }
};

struct alignas(8) Word2 {
  uint32_t low, high;
};

// Four elements of the output, at a multiple of 4.
TILEWRIGHT_DEVICE void store_four(const Attention& p, int64_t at, const float* value) {
  if (p.q.type == Element::kFloat32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) static_cast<float*>(p.out)[at + i] = value[i];
    return;
  }
  Word2 words;
  if (p.q.type == Element::kBFloat16) {
    words = {hopper::pack_bf16x2(value[0], value[1]), hopper::pack_bf16x2(value[2], value[3])};
  } else {
    words = {hopper::pack_f16x2(value[0], value[1]), hopper::pack_f16x2(value[2], value[3])};
  }
  *reinterpret_cast<Word2*>(static_cast<bf16*>(p.out) + at) = words;
}

TILEWRIGHT_DEVICE float warp_max(float x, int width = kWarp) {
  for (int step = width / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
TILEWRIGHT_DEVICE float warp_sum(float x, int width = kWarp) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
// Of magnitudes, the bits of non-negative floats: a NaN is larger than all.
TILEWRIGHT_DEVICE uint32_t warp_max(uint32_t x, int width = kWarp) {
  for (int step = width / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, x, step);
    x = x > other ? x : other;
  }
  return x;
}

TILEWRIGHT_DEVICE uint32_t magnitude_bits(float x) { return hopper::float_bits(x) & kMagnitude; }

// What one row of queries is divided by before it is rounded to e4m3: NaN for a row that is not finite, whose scores,
// and with them its output, become NaN.
struct QueryScale {
  float scale;
  float lift, divisor, reciprocal;  // a power of two that keeps the rest normal, lift * scale, 1 / divisor
};

TILEWRIGHT_DEVICE QueryScale fp8_query_scale(uint32_t largest) {
  constexpr float kTiny = 8.6736174e-19f, kLift = 1.8446744e19f;  // 2^-60, 2^64
  if (largest >= kInfinity) return {not_a_number(), 0.0f, 1.0f, 1.0f};
  const float ratio = hopper::bits_float(largest) / kFp8Limit;
  const float scale = ratio > 0.0f ? ratio : 1.0f, lift = scale < kTiny ? kLift : 1.0f;
  return {scale, lift, scale * lift, 1.0f / (scale * lift)};
}

// q / scale as one division would round it (the quotient, corrected by its remainder, with a correctly rounded
// reciprocal), for a fraction of the instructions; 0 in a row that is not finite.
TILEWRIGHT_DEVICE float fp8_query(float q, const QueryScale& s) {
  const float numerator = s.lift == 0.0f ? 0.0f : q * s.lift;
  const float quotient = numerator * s.reciprocal;
  return fmaf(fmaf(-quotient, s.divisor, numerator), s.reciprocal, quotient);
}

// What turns a product with the integers of K into a score in base-2 units. Never 0, so that a score of -inf stays
// that: where the softmax scale is 0, products times the least normal number are as good as 0.
TILEWRIGHT_DEVICE float score_factor(const Attention& p, float query_scale) {
  constexpr float kLeastNormal = 1.17549435e-38f;
  const float factor = query_scale * fabsf(p.scale) * kLog2e;
  return factor == 0.0f ? kLeastNormal : factor;
}

// A scale of the cache, as float. `at` in bytes.
TILEWRIGHT_DEVICE float cache_scale(const Cache& c, const uint8_t* scales, int64_t at, int group = 0) {
  if (c.scale_type == format::ScaleType::kFloat32) return reinterpret_cast<const float*>(scales + at)[group];
  return hopper::to_float(reinterpret_cast<const bf16*>(scales + at)[group]);
}

// Bytes from the start of k (or v), and of their scales, to the first token of a sequence's head.
TILEWRIGHT_DEVICE int64_t data_at(const Cache& c, int64_t sequence, int64_t head) {
  return sequence * c.data.sequence + head * c.data.head;
}
TILEWRIGHT_DEVICE int64_t scales_at(const Cache& c, int64_t sequence, int64_t head) {
  return sequence * c.scales.sequence + head * c.scales.head;
}

TILEWRIGHT_DEVICE int64_t out_row(const Attention& p, int64_t t, int64_t h) {
  return (t * p.heads + h) * p.cache.head_dim;
}

// Rows of the output past the last offset: zeros, by all threads of a grid together.
TILEWRIGHT_DEVICE void clear_tail(const Attention& p) {
  const int64_t first = larger<int64_t>(0, p.cu_seqlens[p.sequences]);
  const int64_t row = p.heads * p.cache.head_dim;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = first * row + thread; i < p.tokens * row; i += threads) set_element(p.out, p.q.type, i, 0.0f);
}

}  // namespace tilewright::int4_fp8_attention::cuda
