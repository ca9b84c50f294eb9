// SPDX-License-Identifier: Apache-2.0
// Few queries against a long cache. An item is up to 8 rows (a row is a query of one head) of one KV head against one
// chunk of a sequence's keys; its warps take 16 keys in turn, with no barrier until the chunk is done.
//
//   scores   S[8, 16] = q k^T            m16n8k16: rows 0-7 are q, or its upper bfloat16 half; rows 8-15 the lower half
//   weights  2^(x - maximum) times the scale of the value, as bfloat16
//   sums     O^T[D, 8] += v^T p^T        the accumulator layout of S is the operand layout of p^T, so nothing moves
//
// The maximum of a row is raised only when a score exceeds it by 2^8: weights may be up to 2^8 instead of 1, which costs
// no accuracy, and sums are rescaled a few times in all instead of once a step.
#pragma once

#include "ops/int4_fp8_attention/cuda/decode_rows.cuh"

namespace tilewright::int4_fp8_attention::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * kWarp;
inline constexpr float kRaise = 8.0f;  // in base-2 units

struct DecodeCount {
  static TILEWRIGHT_DEVICE int of(const Attention& p, const Sequence& s) {
    return ceil_of(s.queries * p.group(), kDecodeRows) * static_cast<int>(p.cache.heads) * decode_chunks(s);
  }
};

struct DecodeItem {
  Sequence sequence;
  int index;  // of the sequence
  int kv_head, group;
  int first_row, rows;  // of the sequence's queries times heads of the group
  int key_begin, keys;  // of the chunk
  int chunk, chunks;

  TILEWRIGHT_DEVICE int token(int r) const { return sequence.first + (first_row + r) / group; }
  TILEWRIGHT_DEVICE int head(int r) const { return kv_head * group + (first_row + r) % group; }
};

TILEWRIGHT_DEVICE DecodeItem decode_item(const Attention& p, const Place& place) {
  DecodeItem item{};
  item.sequence = sequence_at(p, place.sequence);
  item.index = place.sequence;
  item.group = p.group();
  item.chunks = decode_chunks(item.sequence);
  item.chunk = place.index % item.chunks;
  const int rest = place.index / item.chunks, heads = static_cast<int>(p.cache.heads);
  item.kv_head = rest % heads;
  item.first_row = rest / heads * kDecodeRows;
  item.rows = smaller(kDecodeRows, item.sequence.queries * item.group - item.first_row);
  if (!item.sequence.valid()) return item;
  const int chunk = chunk_keys(item.sequence.keys());
  item.key_begin = item.sequence.key_begin + item.chunk * chunk;
  item.keys = smaller(chunk, item.sequence.length - item.key_begin);
  return item;
}

// What a row sees of the chunk, as keys counted from its start; a row that does not exist sees everything.
TILEWRIGHT_DEVICE Seen seen_of_chunk(const Attention& p, const DecodeItem& item, int row) {
  if (row >= item.rows || !item.sequence.valid()) return {0, item.keys};
  const Seen seen = seen_by(p, item.sequence, (item.first_row + row) / item.group);
  return {larger(0, smaller(item.keys, seen.begin - item.key_begin)),
          larger(0, smaller(item.keys, seen.end - item.key_begin))};
}

TILEWRIGHT_DEVICE int over_rows_min(int x) {
  for (int step = 4; step < kWarp; step *= 2) {
    const int other = __shfl_xor_sync(kAllLanes, x, step);
    x = other < x ? other : x;
  }
  return x;
}

// One warp's work on an item. Step is how 16 keys are read; kTerms 2: the query is the sum of two bfloat16.
template <int D, class Step, int kTerms>
struct DecodeWarp {
  static constexpr int kDepthSteps = D / 16;
  static constexpr int kValueBlocks = D / 16;
  uint32_t q[kDepthSteps][2 * kTerms];
  float factor, maximum = lowest(), total = 0.0f;
  float sums[kValueBlocks][4] = {};
  Seen seen;
  int whole_begin, whole_end;  // keys that every row sees

  TILEWRIGHT_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  // The lane's quarter of row lane / 4.
  TILEWRIGHT_DEVICE void load_query(const Attention& p, const DecodeItem& item) {
    const int row = lane() / 4, t = lane() % 4;
    const bool exists = row < item.rows;
    const int token = exists ? item.token(row) : 0, head = exists ? item.head(row) : 0;
    float value[kDepthSteps][4];
    uint32_t largest = 0;
#pragma unroll
    for (int s = 0; s < kDepthSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[s][i] = exists ? query_element(p, token, head, Step::depth(s, t, i / 2, i % 2)) : 0.0f;
        const uint32_t bits = magnitude_bits(value[s][i]);
        largest = bits > largest ? bits : largest;
      }
    }
    const QueryScale scale = fp8_query_scale(warp_max(largest, 4));
    factor = score_factor(p, kTerms == 1 ? scale.scale : 1.0f);
#pragma unroll
    for (int s = 0; s < kDepthSteps; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) pack_query(scale, value[s][2 * half], value[s][2 * half + 1], s, half);
    }
  }
  TILEWRIGHT_DEVICE void pack_query(const QueryScale& scale, float a, float b, int s, int half) {
    if constexpr (kTerms == 1) {
      const uint16_t pair = hopper::pack_e4m3x2(fp8_query(a, scale), fp8_query(b, scale));
      q[s][half] = hopper::pack_bf16x2(hopper::to_float(hopper::e4m3{static_cast<uint8_t>(pair)}),
                                       hopper::to_float(hopper::e4m3{static_cast<uint8_t>(pair >> 8)}));
    } else {
      const uint32_t upper = hopper::pack_bf16x2(a, b);
      float upper_a, upper_b;
      hopper::unpack_bf16x2(upper, upper_a, upper_b);
      q[s][2 * half] = upper;
      q[s][2 * half + 1] = hopper::pack_bf16x2(a - upper_a, b - upper_b);
    }
  }

  TILEWRIGHT_DEVICE void step(const Source& from, Step& rows, int key) {
    rows.settle();
    float x[kLaneKeys];
    scores(from, rows, x);
    const bool whole = key >= whole_begin && key + kStepKeys <= whole_end;
    if (!whole) hide(key, x, lowest());
    raise(x);
    float weight[kLaneKeys];
    const float shift = maximum == lowest() ? 0.0f : maximum;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const float w = hopper::exp2_flushed(fmaf(x[i], factor, -shift));
      total += w;
      weight[i] = w * rows.value_scale(from, i);
    }
    if (!whole) hide(key, weight, 0.0f);
    const uint32_t p[2] = {hopper::pack_bf16x2(weight[0], weight[1]), hopper::pack_bf16x2(weight[2], weight[3])};
#pragma unroll
    for (int i = 0; i < kValueBlocks; ++i) {
      uint32_t v[4];
      rows.value_operand(i, v);
      hopper::mma_m16n8k16(sums[i], v, p, bf16{});
    }
  }

  // Products of row lane / 4 with the lane's keys, their scales included.
  TILEWRIGHT_DEVICE void scores(const Source& from, const Step& rows, float (&x)[kLaneKeys]) {
    float s[2][4] = {};
#pragma unroll
    for (int d = 0; d < kDepthSteps; ++d) {
      uint32_t a[4] = {q[d][0], 0, q[d][kTerms], 0};
      if constexpr (kTerms == 2) {
        a[1] = q[d][1];
        a[3] = q[d][3];
      }
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        uint32_t b[2];
        rows.key_operand(block, d, b);
        hopper::mma_m16n8k16(s[block], a, b, bf16{});
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const float sum = kTerms == 2 ? s[i / 2][i % 2] + s[i / 2][2 + i % 2] : s[i / 2][i % 2];
      x[i] = sum * rows.key_scale(from, i);
    }
  }

  TILEWRIGHT_DEVICE void hide(int key, float (&x)[kLaneKeys], float otherwise) const {
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int at = key + lane_key(lane(), i);
      x[i] = at >= seen.begin && at < seen.end ? x[i] : otherwise;
    }
  }

  // A row's maximum depends on its own scores alone, whatever rows share the block.
  TILEWRIGHT_DEVICE void raise(const float (&x)[kLaneKeys]) {
    float largest = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2)) * factor;
    const bool raised = largest > maximum + kRaise;
    if (__any_sync(kAllLanes, raised) == 0) return;
    const float correction = raised ? hopper::exp2_flushed(maximum - largest) : 1.0f;
    if (raised) maximum = largest;
    total *= correction;
    const int t = lane() % 4;
    const float column[2] = {__shfl_sync(kAllLanes, correction, 8 * t), __shfl_sync(kAllLanes, correction, 8 * t + 4)};
#pragma unroll
    for (auto& block : sums) {
#pragma unroll
      for (int i = 0; i < 4; ++i) block[i] *= column[i % 2];
    }
  }
};

// What the warps of a block leave for each other.
template <int D>
struct DecodeShared {
  static constexpr int kPitch = D + 4;
  float sums[kDecodeWarps][kDecodeRows][kPitch];
  float maximum[kDecodeWarps][kDecodeRows], total[kDecodeWarps][kDecodeRows];
  DecodeItem item;  // out of the registers while keys are walked
};

template <int D, class Warp>
TILEWRIGHT_DEVICE void leave_sums(const Warp& warp, DecodeShared<D>& shared) {
  const int lane = Warp::lane(), w = static_cast<int>(threadIdx.x) / kWarp, g = lane / 4, t = lane % 4;
  const float total = warp_sum(warp.total, 4);
  if (t == 0) {
    shared.maximum[w][g] = warp.maximum;
    shared.total[w][g] = total;
  }
#pragma unroll
  for (int i = 0; i < Warp::kValueBlocks; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) shared.sums[w][2 * t + e % 2][D / 8 * g + 2 * i + e / 2] = warp.sums[i][e];
  }
}

// Partial results of a row: D sums for each chunk, and behind those of all rows two numbers for each chunk.
TILEWRIGHT_DEVICE int64_t partial_index(const Attention& p, int t, int h, int chunk) {
  return (static_cast<int64_t>(t) * p.heads + h) * most_chunks(p.cache.capacity) + chunk;
}
TILEWRIGHT_DEVICE float* partial_sums(const Attention& p, int64_t index) {
  return p.partials + index * p.cache.head_dim;
}
TILEWRIGHT_DEVICE float* partial_numbers(const Attention& p, int64_t index) {
  return p.partials + p.tokens * p.heads * most_chunks(p.cache.capacity) * p.cache.head_dim + 2 * index;
}

// The warps' sums in their order, to the output or to the partial results of the chunk.
template <int D>
TILEWRIGHT_DEVICE void combine_warps(const Attention& p, const DecodeShared<D>& shared) {
  const DecodeItem& item = shared.item;
  for (int i = static_cast<int>(threadIdx.x); i < kDecodeRows * D; i += kDecodeThreads) {
    const int r = i / D, d = i % D;
    if (r >= item.rows || d >= p.cache.head_dim) continue;
    float maximum = lowest();
    for (int w = 0; w < kDecodeWarps; ++w) maximum = fmaxf(maximum, shared.maximum[w][r]);
    const float shift = maximum == lowest() ? 0.0f : maximum;
    float sum = 0.0f, total = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = hopper::exp2_flushed(shared.maximum[w][r] - shift);
      sum = fmaf(weight, shared.sums[w][r][d], sum);
      total = fmaf(weight, shared.total[w][r], total);
    }
    const int t = item.token(r), h = item.head(r);
    if (item.chunks == 1) {
      const float result = !item.sequence.valid() ? not_a_number() : total == 0.0f ? 0.0f : sum / total;
      set_element(p.out, p.q.type, out_row(p, t, h) + d, result);
      continue;
    }
    const int64_t index = partial_index(p, t, h, item.chunk);
    partial_sums(p, index)[d] = sum;
    if (d == 0) {
      partial_numbers(p, index)[0] = maximum;
      partial_numbers(p, index)[1] = total;
    }
  }
}

template <int D, class Step, int kTerms>
TILEWRIGHT_DEVICE void decode_one(const Attention& p, const DecodeItem& item, DecodeShared<D>& shared) {
  constexpr int kStride = kDecodeWarps * kStepKeys;
  using Warp = DecodeWarp<D, Step, kTerms>;
  const Cache& c = p.cache;
  if (threadIdx.x == 0) shared.item = item;
  Warp warp;
  warp.seen = seen_of_chunk(p, item, Warp::lane() / 4);
  warp.whole_begin = -over_rows_min(-warp.seen.begin);
  warp.whole_end = over_rows_min(warp.seen.end);
  const int begin = seen_of_chunk(p, item, 0).begin, end = seen_of_chunk(p, item, item.rows - 1).end;
  const int64_t data = data_at(c, item.index, item.kv_head) + item.key_begin * c.data.token;
  const int64_t scales = scales_at(c, item.index, item.kv_head) + item.key_begin * c.scales.token;
  const bool wide = c.scale_type == format::ScaleType::kFloat32;
  const uint8_t *k_scales = c.k_scales + scales, *v_scales = c.v_scales + scales;
  const bool paired = !wide && c.scales.token == static_cast<int64_t>(sizeof(bf16)) &&
                      (reinterpret_cast<uintptr_t>(k_scales) | reinterpret_cast<uintptr_t>(v_scales)) % 4 == 0;
  const int bytes = static_cast<int>(row_bytes(c.format, c.head_dim));
  const Source from{c.k + data, c.v + data, k_scales, v_scales, c.data.token, c.scales.token,
                    bytes,      wide,       paired,   begin,    end};
  int key = begin / kStride * kStride + static_cast<int>(threadIdx.x) / kWarp * kStepKeys;
  Step even;
  even.load(from, key, Warp::lane());
  if constexpr (Step::kScaled) {
    Step odd;  // two loads are under way while a third is worked on
    odd.load(from, key + kStride, Warp::lane());
    warp.load_query(p, item);
    for (; key < end; key += 2 * kStride) {
      warp.step(from, even, key);
      even.load(from, key + 2 * kStride, Warp::lane());
      if (key + kStride < end) warp.step(from, odd, key + kStride);
      odd.load(from, key + 3 * kStride, Warp::lane());
    }
  } else {  // four times the bytes: other warps of the processor are enough
    warp.load_query(p, item);
    for (; key < end; key += kStride) {
      warp.step(from, even, key);
      even.load(from, key + kStride, Warp::lane());
    }
  }
  leave_sums<D>(warp, shared);
  __syncthreads();
  combine_warps<D>(p, shared);
  __syncthreads();
}

// Blocks of a multiprocessor: 16 keys of 128 bfloat16 take 64 registers of each lane.
template <int D, class Step>
inline constexpr int kDecodeBlocks = Step::kScaled || D == 64 ? 3 : 2;

template <int D, class Step, int kTerms>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks<D, Step>)
    decode_attention(const __grid_constant__ Attention p) {
  auto& shared = *reinterpret_cast<DecodeShared<D>*>(hopper::shared_memory());
  clear_tail(p);
  for (int index = static_cast<int>(blockIdx.x);; index += static_cast<int>(gridDim.x)) {
    const Place place = find_item<DecodeCount>(p, index);
    if (place.sequence < 0) break;
    decode_one<D, Step, kTerms>(p, decode_item(p, place), shared);
  }
  hopper::allow_next_kernel();
}

inline constexpr int kCombineWarps = 4;

// One warp adds up the chunks of one row, in the order of the keys; lane c weighs chunk c.
__global__ void __launch_bounds__(kCombineWarps* kWarp) combine_chunks(const __grid_constant__ Attention p) {
  static_assert(kMaxChunks <= kWarp, "a lane for each chunk");
  hopper::wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = static_cast<int>(blockIdx.x * kCombineWarps + threadIdx.x / kWarp), heads = static_cast<int>(p.heads);
  const int t = row / heads, h = row % heads;
  if (t >= smaller(p.tokens, p.cu_seqlens[p.sequences])) return;
  const Sequence sequence = sequence_at(p, sequence_with(p.cu_seqlens, p.sequences, t));
  const int chunks = decode_chunks(sequence);
  if (chunks == 1) return;
  const int64_t first = partial_index(p, t, h, 0);
  const float maximum = lane < chunks ? partial_numbers(p, first + lane)[0] : lowest();
  const float total = lane < chunks ? partial_numbers(p, first + lane)[1] : 0.0f;
  const float largest = warp_max(maximum);
  const float weight = hopper::exp2_flushed(maximum - (largest == lowest() ? 0.0f : largest));
  const float all = warp_sum(weight * total);
  const float normalizer = all == 0.0f ? 0.0f : 1.0f / all;
  for (int first_d = 0; first_d < p.cache.head_dim; first_d += kWarp) {
    const int d = first_d + lane;
    const bool present = d < p.cache.head_dim;
    float sum = 0.0f;
    for (int c = 0; c < chunks; ++c) {
      const float of_chunk = present ? partial_sums(p, first + c)[d] : 0.0f;
      sum = fmaf(__shfl_sync(kAllLanes, weight, c), of_chunk, sum);
    }
    if (present) set_element(p.out, p.q.type, out_row(p, t, h) + d, sum * normalizer);
  }
}

}  // namespace tilewright::int4_fp8_attention::cuda
