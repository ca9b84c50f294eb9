// SPDX-License-Identifier: Apache-2.0
// Few queries against a long cache. An item is up to 8 rows (a row is a query of one head) of one KV head against one
// chunk of a sequence's keys; its warps take 16 keys in turn, with no barrier until the chunk is done.
//
//   scores   S^T[16, 8] = k q^T          m16n8k16; a float query is the sum of two bfloat16, hence two products
//   weights  2^(x - maximum) times the scale of the value, as bfloat16; four shuffles transpose the 16 x 8 of them
//   sums     O^T[D, 8] += v^T p^T
//
// The maximum of a row is raised only when a score exceeds it by 2^8: weights may be up to 2^8 instead of 1, which
// costs no accuracy, and sums are rescaled a few times in all instead of once a step.
#pragma once

#include "ops/int4_fp8_attention/cuda/decode_rows.cuh"

namespace tilewright::int4_fp8_attention::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * kWarp;
inline constexpr float kRaise = 8.0f;  // in base-2 units

struct DecodeCount {
  static TILEWRIGHT_DEVICE int of(const Attention& p, const Sequence& s) {
    return ceil_of(s.queries * p.group(), kDecodeRows) * static_cast<int>(p.cache.heads) * decode_chunks(p, s);
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
  item.chunks = decode_chunks(p, item.sequence);
  item.chunk = place.index % item.chunks;
  const int rest = place.index / item.chunks, heads = static_cast<int>(p.cache.heads);
  item.kv_head = rest % heads;
  item.first_row = rest / heads * kDecodeRows;
  item.rows = smaller(kDecodeRows, item.sequence.queries * item.group - item.first_row);
  if (!item.sequence.valid()) return item;
  const int chunk = decode_chunk_keys(p, item.sequence);
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

// One warp's work on an item. Step is how 16 keys are read; kTerms 2: the query is the sum of two bfloat16. Lane 4g + t
// has query row g as operand, and the scores, weights and sums of rows 2t and 2t + 1.
template <int D, class Step, int kTerms>
struct DecodeWarp {
  static constexpr int kDepthSteps = D / 16;
  static constexpr int kValueBlocks = D / 16;
  static constexpr int kRows = 2;
  uint32_t q[kDepthSteps][2 * kTerms];
  float factor[kRows], maximum[kRows], total[kRows];
  float sums[kValueBlocks][4];
  Seen seen[kRows];
  int whole_begin, whole_end;  // keys that every row sees

  TILEWRIGHT_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  // The lane's quarter of row lane / 4.
  TILEWRIGHT_DEVICE void load_query(const Attention& p, const DecodeItem& item) {
    constexpr int kPieces = D / 32, kLength = 8;
    const int row = lane() / 4, t = lane() % 4;
    const bool exists = row < item.rows, aligned = in_vectors(p.q);
    const int64_t at = exists ? item.token(row) * p.q.token_stride + item.head(row) * p.q.head_stride : 0;
    RawRow<kPieces, kLength> raw;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int d = Step::piece_at(i, t);
      raw.load(p.q, aligned, i, exists && d < p.cache.head_dim ? kLength : 0, at + d);
    }
    float value[kPieces][kLength];
    uint32_t largest = 0;
    const float sign = p.scale < 0.0f ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      raw.values(p.q.type, i, value[i]);
#pragma unroll
      for (float& x : value[i]) {
        x *= sign;
        largest = larger(largest, magnitude_bits(x));
      }
    }
    const QueryScale scale = fp8_query_scale(warp_max(largest, 4));
    const float of_row = score_factor(p, kTerms == 1 ? scale.scale : 1.0f);
#pragma unroll
    for (int e = 0; e < kRows; ++e) factor[e] = __shfl_sync(kAllLanes, of_row, 4 * (2 * t + e));
#pragma unroll
    for (int s = 0; s < kDepthSteps; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = value[s / 2][Step::in_piece(s % 2, half, 0)], b = value[s / 2][Step::in_piece(s % 2, half, 1)];
        pack_query(scale, a, b, s, half);
      }
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
      q[s][half] = upper;
      q[s][2 + half] = hopper::pack_bf16x2(a - upper_a, b - upper_b);
    }
  }

  // Before the first key of a chunk.
  TILEWRIGHT_DEVICE void start(const Attention& p, const DecodeItem& item) {
    int begin = 0, end = item.keys;
#pragma unroll
    for (int e = 0; e < kRows; ++e) {
      maximum[e] = lowest();
      total[e] = 0.0f;
      seen[e] = seen_of_chunk(p, item, 2 * (lane() % 4) + e);
      begin = larger(begin, seen[e].begin);
      end = smaller(end, seen[e].end);
    }
    for (int step = 1; step < 4; step *= 2) {
      begin = larger(begin, __shfl_xor_sync(kAllLanes, begin, step));
      end = smaller(end, __shfl_xor_sync(kAllLanes, end, step));
    }
    whole_begin = begin;
    whole_end = end;
#pragma unroll
    for (auto& block : sums) {
#pragma unroll
      for (float& x : block) x = 0.0f;
    }
  }

  // Index i of scores and weights: key lane / 4 + 8 (i / 2), row 2 (lane % 4) + i % 2.
  TILEWRIGHT_DEVICE void step(const Source& from, Step& rows, int key) {
    rows.settle();
    float x[4];
    scores(from, rows, x);
    const bool whole = key >= whole_begin && key + kStepKeys <= whole_end;
    if (!whole) hide(key, x, lowest());
    raise(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float shift = maximum[i % 2] == lowest() ? 0.0f : maximum[i % 2];
      x[i] = hopper::exp2_flushed(fmaf(x[i], factor[i % 2], -shift));
      total[i % 2] += x[i];
    }
    uint32_t p[Step::kGroups][2];
#pragma unroll
    for (int group = 0; group < Step::kGroups; ++group) {
      float weight[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) weight[i] = x[i] * rows.value_scale(from, group, i / 2);
      if (!whole) hide(key, weight, 0.0f);
      transpose(weight, p[group]);
    }
#pragma unroll
    for (int i = 0; i < kValueBlocks; ++i) {
      uint32_t v[4];
      rows.value_operand(i, v);
      hopper::mma_m16n8k16(sums[i], v, p[Step::value_group(i)], bf16{});
    }
  }

  TILEWRIGHT_DEVICE void scores(const Source& from, const Step& rows, float (&x)[4]) {
    float products[Step::kGroups][4] = {};
#pragma unroll
    for (int d = 0; d < kDepthSteps; ++d) {
      uint32_t k[4];
      rows.key_operand(d, k);
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        const uint32_t b[2] = {q[d][2 * term], q[d][2 * term + 1]};
        hopper::mma_m16n8k16(products[Step::key_group(d)], k, b, bf16{});
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = products[0][i] * rows.key_scale(from, 0, i / 2);
#pragma unroll
      for (int group = 1; group < Step::kGroups; ++group) {
        x[i] = fmaf(products[group][i], rows.key_scale(from, group, i / 2), x[i]);
      }
    }
  }

  TILEWRIGHT_DEVICE void hide(int key, float (&x)[4], float otherwise) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = key + lane() / 4 + 8 * (i / 2);
      x[i] = at >= seen[i % 2].begin && at < seen[i % 2].end ? x[i] : otherwise;
    }
  }

  // A row's maximum depends on its own scores alone, whatever rows share the block.
  TILEWRIGHT_DEVICE void raise(const float (&x)[4]) {
    float largest[kRows];
    bool raised[kRows];
#pragma unroll
    for (int e = 0; e < kRows; ++e) largest[e] = fmaxf(x[e], x[2 + e]);
    for (int step = 4; step < kWarp; step *= 2) {
#pragma unroll
      for (float& best : largest) best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, step));
    }
#pragma unroll
    for (int e = 0; e < kRows; ++e) {
      largest[e] *= factor[e];
      raised[e] = largest[e] > maximum[e] + kRaise;
    }
    if (__any_sync(kAllLanes, raised[0] || raised[1]) == 0) return;
    float correction[kRows];
#pragma unroll
    for (int e = 0; e < kRows; ++e) {
      correction[e] = raised[e] ? hopper::exp2_flushed(maximum[e] - largest[e]) : 1.0f;
      maximum[e] = raised[e] ? largest[e] : maximum[e];
      total[e] *= correction[e];
    }
#pragma unroll
    for (auto& block : sums) {
#pragma unroll
      for (int i = 0; i < 4; ++i) block[i] *= correction[i % 2];
    }
  }

  // The weights of row lane / 4 for keys 2t, 2t+1 and 2t+8, 2t+9, from the lanes that have them for two rows.
  TILEWRIGHT_DEVICE void transpose(const float (&x)[4], uint32_t (&p)[2]) const {
    const int g = lane() / 4, source = 8 * (lane() % 4) + g / 2;
    const unsigned halves = g % 2 == 0 ? kLowHalves : kHighHalves;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint32_t word = hopper::pack_bf16x2(x[2 * block], x[2 * block + 1]);
      const uint32_t even = __shfl_sync(kAllLanes, word, source), odd = __shfl_sync(kAllLanes, word, source + 4);
      p[block] = __byte_perm(even, odd, halves);
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

template <int D, class Step, class Warp>
TILEWRIGHT_DEVICE void leave_sums(const Warp& warp, DecodeShared<D>& shared) {
  const int lane = Warp::lane(), w = static_cast<int>(threadIdx.x) / kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int e = 0; e < Warp::kRows; ++e) {
    float total = warp.total[e];
    for (int step = 4; step < kWarp; step *= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    if (g == 0) {
      shared.maximum[w][2 * t + e] = warp.maximum[e];
      shared.total[w][2 * t + e] = total;
    }
  }
#pragma unroll
  for (int i = 0; i < Warp::kValueBlocks; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) shared.sums[w][2 * t + e % 2][Step::value_at(i, g) + e / 2] = warp.sums[i][e];
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

// Where the keys of an item's chunk lie.
TILEWRIGHT_DEVICE Source source_of(const Attention& p, const DecodeItem& item) {
  const Cache& c = p.cache;
  const int64_t data = data_at(c, item.index, item.kv_head) + item.key_begin * c.data.token;
  const int64_t scales = scales_at(c, item.index, item.kv_head) + item.key_begin * c.scales.token;
  return {c.k + data,
          c.v + data,
          c.k_scales + scales,
          c.v_scales + scales,
          c.data.token,
          c.scales.token,
          static_cast<int>(row_bytes(c.format, c.head_dim)),
          c.scale_type == format::ScaleType::kFloat32,
          seen_of_chunk(p, item, 0).begin,
          seen_of_chunk(p, item, item.rows - 1).end};
}

// The steps of a chunk that are on their way from memory: two while a third is worked on, where registers allow it.
// Longer rows bring more bytes in one, and other warps of the multiprocessor are enough.
template <class Step>
struct Window {
  static constexpr int kStride = kDecodeWarps * kStepKeys;
  static constexpr int kSteps = Step::kAhead;
  Step steps[kSteps];

  TILEWRIGHT_DEVICE static int first_key(const Source& from) {
    return from.begin / kStride * kStride + static_cast<int>(threadIdx.x) / kWarp * kStepKeys;
  }
  TILEWRIGHT_DEVICE void open(const Source& from) {
    const int key = first_key(from), lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) steps[i].load(from, key + i * kStride, lane);
  }
  template <class Warp>
  TILEWRIGHT_DEVICE void walk(const Source& from, Warp& warp) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int key = first_key(from); key < from.end; key += kSteps * kStride) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (i == 0 || key + i * kStride < from.end) warp.step(from, steps[i], key + i * kStride);
        steps[i].load(from, key + (kSteps + i) * kStride, lane);
      }
    }
  }
};

// Blocks of a multiprocessor: as many as registers allow. 16 keys of 128 bfloat16 take 64 of each lane, and a query of
// two terms 32.
template <int D, class Step, int kTerms>
inline constexpr int kDecodeBlocks = D == 64 || (D == 128 && Step::kAhead == 2 && kTerms == 1) ? 3 : 2;

// Items one after the other.
struct ItemWalk {
  Place place{-1, 0};
  int left = 0;  // items of the sequence that are to come

  TILEWRIGHT_DEVICE DecodeItem next(const Attention& p, int index) {
    if (left == 0) {
      place = find_item<DecodeCount>(p, index);
      left = DecodeCount::of(p, sequence_at(p, place.sequence)) - place.index;
    } else {
      ++place.index;
    }
    --left;
    return decode_item(p, place);
  }
};

// A block has a contiguous share of the items: chunks of one sequence and head follow each other, so that their query
// is read once.
template <int D, class Step, int kTerms>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks<D, Step, kTerms>)
    decode_attention(const __grid_constant__ Attention p) {
  auto& shared = *reinterpret_cast<DecodeShared<D>*>(hopper::shared_memory());
  clear_tail(p);
  const int items = count_items<DecodeCount>(p);
  const int first = share_of(items, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  const int end = share_of(items, static_cast<int>(blockIdx.x) + 1, static_cast<int>(gridDim.x));
  ItemWalk walk;
  DecodeWarp<D, Step, kTerms> warp;
  Window<Step> window;
  DecodeItem item{};
  Source from{};
  if (first < end) {
    item = walk.next(p, first);
    from = source_of(p, item);
    window.open(from);
  }
  for (int index = first; index < end; ++index) {
    if (threadIdx.x == 0) shared.item = item;
    if (index == first || item.chunk == 0) warp.load_query(p, item);
    warp.start(p, item);
    window.walk(from, warp);
    if (index + 1 < end) {  // the next chunk's first keys come while this one's warps are combined
      item = walk.next(p, index + 1);
      from = source_of(p, item);
      window.open(from);
    }
    leave_sums<D, Step>(warp, shared);
    __syncthreads();
    combine_warps<D>(p, shared);
    __syncthreads();
  }
  hopper::allow_next_kernel();
}

inline constexpr int kCombineWarps = 4;

// Elements d to d + 3 of the chunks' sums, each times the weight that lane c has for chunk c.
TILEWRIGHT_DEVICE void add_chunks(const Attention& p, int64_t first, int chunks, float weight, int d, float (&sum)[4]) {
  constexpr int kAtOnce = 8;  // loads under way
  for (int c = 0; c < chunks; c += kAtOnce) {
    U128 part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      part[i] = U128{0, 0, 0, 0};
      const bool present = c + i < chunks && d < p.cache.head_dim;
      if (present) part[i] = hopper::load_16(partial_sums(p, first + c + i) + d);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float of_chunk = __shfl_sync(kAllLanes, weight, c + i);  // 0 past the last
      sum[0] = fmaf(of_chunk, hopper::bits_float(part[i].x), sum[0]);
      sum[1] = fmaf(of_chunk, hopper::bits_float(part[i].y), sum[1]);
      sum[2] = fmaf(of_chunk, hopper::bits_float(part[i].z), sum[2]);
      sum[3] = fmaf(of_chunk, hopper::bits_float(part[i].w), sum[3]);
    }
  }
}

// One warp adds up the chunks of one row, in the order of the keys; lane c weighs chunk c.
__global__ void __launch_bounds__(kCombineWarps* kWarp) combine_chunks(const __grid_constant__ Attention p) {
  static_assert(kMaxChunks <= kWarp, "a lane for each chunk");
  hopper::wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = static_cast<int>(blockIdx.x * kCombineWarps + threadIdx.x / kWarp), heads = static_cast<int>(p.heads);
  const int t = row / heads, h = row % heads;
  if (t >= smaller(p.tokens, p.cu_seqlens[p.sequences])) return;
  const Sequence sequence = sequence_at(p, sequence_with(p.cu_seqlens, p.sequences, t));
  const int chunks = decode_chunks(p, sequence);
  if (chunks == 1) return;
  const int64_t first = partial_index(p, t, h, 0);
  const float maximum = lane < chunks ? partial_numbers(p, first + lane)[0] : lowest();
  const float total = lane < chunks ? partial_numbers(p, first + lane)[1] : 0.0f;
  const float largest = warp_max(maximum);
  const float weight = hopper::exp2_flushed(maximum - (largest == lowest() ? 0.0f : largest));
  const float all = warp_sum(weight * total);
  const float normalizer = all == 0.0f ? 0.0f : 1.0f / all;
  for (int d = 4 * lane; d - 4 * lane < p.cache.head_dim; d += 4 * kWarp) {
    float sum[4] = {};
    add_chunks(p, first, chunks, weight, d, sum);
#pragma unroll
    for (float& x : sum) x *= normalizer;
    if (d < p.cache.head_dim) store_four(p, out_row(p, t, h) + d, sum);
  }
}

}  // namespace tilewright::int4_fp8_attention::cuda
