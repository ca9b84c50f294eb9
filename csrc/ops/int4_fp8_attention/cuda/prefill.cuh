// SPDX-License-Identifier: Apache-2.0
// Many queries: 128 rows (queries times heads of a KV head) of a block against all keys that they see, in tiles of 64.
// One warpgroup decodes tiles into shared memory; two others, 64 rows each, multiply:
//
//   scores   S[64, 64] = q k^T      e4m3 by e4m3, q in registers; exact products
//   weights  2^(x - maximum) times the scale of the value, as bfloat16, in registers
//   sums     O[64, D] += p v        bfloat16
//
// Three stages are under way at once, as in FireQ: while the softmax of tile j runs, the matrix unit works on the sums
// of tile j-1 and the scores of tile j+1; hence two buffers of scores. Weights stay bfloat16: at the e4m3 rate the
// exponentials (16 a cycle and multiprocessor) would be the bound, and e4m3 weights cost 2^-4 of accuracy.
//
// As in decode.cuh, a row's maximum is raised only when a score exceeds it by 2^8.
#pragma once

#include "ops/int4_fp8_attention/cuda/prefill_tiles.cuh"

namespace tilewright::int4_fp8_attention::cuda {

inline constexpr int kGroupRows = 64;  // of a consumer warpgroup
inline constexpr int kScores = kPrefillKeys / 2;  // registers of one thread
inline constexpr int kRowsPerThread = 2;
inline constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
inline constexpr float kRaiseBy = 8.0f;  // in base-2 units

struct PrefillCount {
  static TILEWRIGHT_DEVICE int of(const Attention& p, const Sequence& s) {
    return ceil_of(s.queries, prefill_tokens(p)) * static_cast<int>(p.cache.heads);
  }
};

struct PrefillItem {
  Sequence sequence;
  int index;  // of the sequence
  int kv_head, group;
  int first, tokens;  // queries of the sequence
  int key_begin;  // of tile 0
  Seen seen;  // by any row

  // Row r holds query r / group and head r % group.
  TILEWRIGHT_DEVICE bool exists(int r) const { return r / group < tokens; }
  TILEWRIGHT_DEVICE int query(int r) const { return first + r / group; }
  TILEWRIGHT_DEVICE int token(int r) const { return sequence.first + query(r); }
  TILEWRIGHT_DEVICE int head(int r) const { return kv_head * group + r % group; }
};

// The blocks of a sequence that see most keys come first: those that are left at the end are short.
TILEWRIGHT_DEVICE PrefillItem prefill_item(const Attention& p, const Place& place) {
  PrefillItem item{};
  item.sequence = sequence_at(p, place.sequence);
  item.index = place.sequence;
  item.group = p.group();
  const int heads = static_cast<int>(p.cache.heads), block = prefill_tokens(p);
  item.kv_head = place.index % heads;
  item.first = (ceil_of(item.sequence.queries, block) - 1 - place.index / heads) * block;
  item.tokens = smaller(block, item.sequence.queries - item.first);
  item.seen = {seen_by(p, item.sequence, item.first).begin,
               seen_by(p, item.sequence, item.first + item.tokens - 1).end};
  item.key_begin = item.seen.begin / kPrefillKeys * kPrefillKeys;
  return item;
}

TILEWRIGHT_DEVICE PrefillSource source_of(const Attention& p, const PrefillItem& item) {
  const Cache& c = p.cache;
  const int64_t data = data_at(c, item.index, item.kv_head) + item.key_begin * c.data.token;
  const int64_t scales = scales_at(c, item.index, item.kv_head) + item.key_begin * c.scales.token;
  const int end = item.seen.end - item.key_begin;
  return {c.k + data,
          c.v + data,
          c.k_scales + scales,
          c.v_scales + scales,
          c.data.token,
          c.scales.token,
          static_cast<int>(row_bytes(c.format, c.head_dim)),
          c.scale_type == format::ScaleType::kFloat32,
          item.seen.begin - item.key_begin,
          end,
          (end + kPrefillKeys - 1) / kPrefillKeys};
}

// What a consumer thread knows of its rows lane / 4 and lane / 4 + 8 of the warp's 16.
struct RowState {
  float factor[kRowsPerThread], maximum[kRowsPerThread], total[kRowsPerThread];
  int begin[kRowsPerThread], end[kRowsPerThread];  // keys seen, counted from tile 0
  int whole_begin, whole_end;  // keys that every row of the warp sees
};

TILEWRIGHT_DEVICE int thread_row(int i) {
  const int thread = static_cast<int>(threadIdx.x) - kProducers;
  return thread / kWarp * 16 + thread % kWarp / 4 + 8 * i;
}

TILEWRIGHT_DEVICE void init_rows(const Attention& p, const PrefillItem& item, int keys, RowState& rows) {
  int begin = 0, end = keys;
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int r = thread_row(i);
    rows.maximum[i] = lowest();
    rows.total[i] = 0.0f;
    rows.begin[i] = 0;
    rows.end[i] = keys;
    if (item.exists(r)) {
      const Seen seen = seen_by(p, item.sequence, item.query(r));
      rows.begin[i] = seen.begin - item.key_begin;
      rows.end[i] = seen.end - item.key_begin;
    }
    begin = rows.begin[i] > begin ? rows.begin[i] : begin;
    end = rows.end[i] < end ? rows.end[i] : end;
  }
  for (int step = 4; step < kWarp; step *= 2) {
    const int other_begin = __shfl_xor_sync(kAllLanes, begin, step), other_end = __shfl_xor_sync(kAllLanes, end, step);
    begin = other_begin > begin ? other_begin : begin;
    end = other_end < end ? other_end : end;
  }
  rows.whole_begin = begin;
  rows.whole_end = end;
}

// The thread's rows as the register operand of the score products: word j of a step is row j % 2, elements 4 (lane % 4)
// to 4 (lane % 4) + 3 of half j / 2 of 32.
template <int D>
TILEWRIGHT_DEVICE void load_queries(const Attention& p, const PrefillItem& item, RowState& rows,
                                    uint32_t (&q)[D / 32][4]) {
  constexpr int kPieces = D / 16;
  const int column = 4 * (static_cast<int>(threadIdx.x) % 4);
  const bool aligned = in_vectors(p.q);
  const float sign = p.scale < 0.0f ? -1.0f : 1.0f;
  RawRow<kPieces, 4> raw[kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int r = thread_row(i);
    const bool exists = item.exists(r);
    const int64_t at = item.token(r) * p.q.token_stride + item.head(r) * p.q.head_stride + column;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      raw[i].load(p.q, aligned, n, exists && 16 * n + column < p.cache.head_dim ? 4 : 0, at + 16 * n);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    float value[kPieces][4];
    uint32_t largest = 0;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      raw[i].values(p.q.type, n, value[n]);
#pragma unroll
      for (const float x : value[n]) largest = larger(largest, magnitude_bits(x));
    }
    const QueryScale scale = fp8_query_scale(warp_max(largest, 4));
    rows.factor[i] = score_factor(p, scale.scale);
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
#pragma unroll
      for (float& x : value[n]) x = fp8_query(sign * x, scale);
      q[n / 2][2 * (n % 2) + i] = hopper::pack_e4m3x4(value[n][0], value[n][1], value[n][2], value[n][3]);
    }
  }
}

template <int D>
TILEWRIGHT_DEVICE void issue_scores(float (&s)[kScores], const uint32_t (&q)[D / 32][4], const char* keys) {
#pragma unroll
  for (int k = 0; k < D / 32; ++k) {
    hopper::Wgmma<e4m3, e4m3, kPrefillKeys>::run(s, q[k], PrefillShared<D>::KeyTile::k_major(keys, 0, 32 * k), k > 0);
  }
}

template <int D>
TILEWRIGHT_DEVICE void issue_sums(float (&o)[D / 2], const uint32_t (&p)[kPrefillKeys / 16][4], const char* values) {
#pragma unroll
  for (int k = 0; k < kPrefillKeys / 16; ++k) {
    hopper::Wgmma<bf16, bf16, D, hopper::Major::kK, hopper::Major::kMN>::run(
        o, p[k], PrefillShared<D>::ValueTile::mn_major(values, 16 * k, 0), true);
  }
}

// Register i of the scores is row (i / 2) % 2 of the thread's two and key 8 (i / 4) + 2 (lane % 4) + i % 2.
TILEWRIGHT_DEVICE void hide(float (&x)[kScores], const RowState& rows, int first, float otherwise) {
  const int column = first + 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const int key = column + 8 * (i / 4) + i % 2, row = i / 2 % 2;
    x[i] = key >= rows.begin[row] && key < rows.end[row] ? x[i] : otherwise;
  }
}

// Each column times its key's scale.
TILEWRIGHT_DEVICE void scale_columns(float (&x)[kScores], const float* scales) {
  const float* at = scales + 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int i = 0; i < kScores; i += 4) {
    const float even = at[2 * i], odd = at[2 * i + 1];
    x[i] *= even;
    x[i + 1] *= odd;
    x[i + 2] *= even;
    x[i + 3] *= odd;
  }
}

// Raises maxima where the tile exceeds them; returns whether any row of the warp was, and what earlier sums are worth.
TILEWRIGHT_DEVICE bool raise_maxima(const float (&x)[kScores], RowState& rows, float (&correction)[kRowsPerThread]) {
  bool raised = false;
#pragma unroll
  for (int row = 0; row < kRowsPerThread; ++row) {
    float largest = lowest();
#pragma unroll
    for (int i = 0; i < kScores; i += 4) largest = fmaxf(largest, fmaxf(x[i + 2 * row], x[i + 2 * row + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2)) * rows.factor[row];
    const bool raise = largest > rows.maximum[row] + kRaiseBy;
    correction[row] = raise ? hopper::exp2_flushed(rows.maximum[row] - largest) : 1.0f;
    rows.maximum[row] = raise ? largest : rows.maximum[row];
    raised = raised || raise;
  }
  return __any_sync(kAllLanes, raised) != 0;
}

// Scores become weights; totals grow.
TILEWRIGHT_DEVICE void weigh(float (&x)[kScores], RowState& rows) {
#pragma unroll
  for (int row = 0; row < kRowsPerThread; ++row) {
    const float shift = rows.maximum[row] == lowest() ? 0.0f : rows.maximum[row];
    float total[2] = {};
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& weight = x[i + 2 * row + e];
        weight = hopper::exp2_flushed(fmaf(weight, rows.factor[row], -shift));
        total[e] += weight;
      }
    }
    rows.total[row] += total[0] + total[1];
  }
}

// The softmax of one tile: scores in, weights times value scales out.
TILEWRIGHT_DEVICE bool soften(float (&x)[kScores], RowState& rows, const float* key_scales, const float* value_scales,
                              int first, float (&correction)[kRowsPerThread]) {
  const bool whole = first >= rows.whole_begin && first + kPrefillKeys <= rows.whole_end;
  scale_columns(x, key_scales);
  if (!whole) hide(x, rows, first, lowest());
  const bool raised = raise_maxima(x, rows, correction);
#pragma unroll
  for (int row = 0; row < kRowsPerThread; ++row) rows.total[row] *= correction[row];
  weigh(x, rows);
  scale_columns(x, value_scales);
  if (!whole) hide(x, rows, first, 0.0f);
  return raised;
}

TILEWRIGHT_DEVICE void pack_weights(const float (&x)[kScores], uint32_t (&p)[kPrefillKeys / 16][4]) {
#pragma unroll
  for (int i = 0; i < kScores; i += 2) p[i / 8][i / 2 % 4] = hopper::pack_bf16x2(x[i], x[i + 1]);
}

// What the matrix unit reads and adds to in one consumer thread.
template <int D>
struct Operands {
  uint32_t q[D / 32][4];
  uint32_t p[kPrefillKeys / 16][4];
  float o[D / 2];
};

// Registers that products will read or add to are final.
template <int D>
TILEWRIGHT_DEVICE void fence(Operands<D>& x, float (&s)[kScores]) {
#pragma unroll
  for (int k = 0; k < kPrefillKeys / 16; ++k) hopper::keep(x.p[k]);
  hopper::keep(x.o);
  hopper::keep(s);
  hopper::wgmma_fence();
}

template <int D>
TILEWRIGHT_DEVICE void await_tile(PrefillShared<D>& shared, int n) {
  hopper::wait(shared.full[stage_of(n)], phase_of(n));
}
// The tile's stage may be filled again.
template <int D>
TILEWRIGHT_DEVICE void release(PrefillShared<D>& shared, int n) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) hopper::arrive(shared.empty[stage_of(n)]);
}

// The consumer groups issue their products in turn: while the matrix unit works for one, the other has its softmax. A
// barrier for each group: it waits there for the other's arrival.
TILEWRIGHT_DEVICE void await_turn(int group) { hopper::named_sync(1 + group, kConsumerGroups * kProducers); }
TILEWRIGHT_DEVICE void give_turn(int group) { hopper::named_arrive(1 + group, kConsumerGroups * kProducers); }

// An item's tiles: how many, and which of the block's tiles is the first.
struct Tiles {
  int count, first;
};

// Tile j, whose scores are in `current`: its softmax, while the sums of tile j-1 are added up and the scores of tile
// j+1 come into `next`; of the last tile once more when there is none: a product that nobody reads costs less than a
// branch between products.
template <int D>
TILEWRIGHT_DEVICE void consume(PrefillShared<D>& shared, Operands<D>& x, RowState& rows, int group, const Tiles& tiles,
                               int j, float (&current)[kScores], float (&next)[kScores]) {
  const int n = tiles.first + j, following = tiles.first + smaller(j + 1, tiles.count - 1);
  await_tile(shared, following);
  await_turn(group);
  fence<D>(x, next);
  issue_sums<D>(x.o, x.p, shared.values[stage_of(n - 1)]);
  hopper::wgmma_commit();
  issue_scores<D>(next, x.q, shared.keys[stage_of(following)]);
  hopper::wgmma_commit();
  if (group == 0 || j + 1 < tiles.count) give_turn(1 - group);
  float correction[kRowsPerThread];
  const int stage = stage_of(n);
  const bool raised =
      soften(current, rows, shared.key_scales[stage], shared.value_scales[stage], j * kPrefillKeys, correction);
  hopper::wgmma_wait<1>();
  hopper::keep(x.o);
  release(shared, n - 1);
  if (raised) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) x.o[i] *= correction[i / 2 % 2];
  }
  pack_weights(current, x.p);
  hopper::wgmma_wait<0>();
  hopper::keep(next);
}

// The scores of tile 0, then its softmax while those of tile 1 are on their way.
template <int D>
TILEWRIGHT_DEVICE void begin(PrefillShared<D>& shared, Operands<D>& x, RowState& rows, const Tiles& tiles,
                             float (&current)[kScores], float (&next)[kScores]) {
  const int stage = stage_of(tiles.first), following = tiles.first + smaller(1, tiles.count - 1);
  await_tile(shared, tiles.first);
  fence<D>(x, current);
  issue_scores<D>(current, x.q, shared.keys[stage]);
  hopper::wgmma_commit();
  hopper::wgmma_wait<0>();
  hopper::keep(current);
  await_tile(shared, following);
  fence<D>(x, next);
  issue_scores<D>(next, x.q, shared.keys[stage_of(following)]);
  hopper::wgmma_commit();
  float correction[kRowsPerThread];
  soften(current, rows, shared.key_scales[stage], shared.value_scales[stage], 0, correction);
  pack_weights(current, x.p);
  hopper::wgmma_wait<0>();
  hopper::keep(next);
}

// One item from its first tile to its last; the sums are then in x.o.
template <int D>
TILEWRIGHT_DEVICE void consume_all(PrefillShared<D>& shared, const Tiles& tiles, int group, Operands<D>& x,
                                   RowState& rows) {
#pragma unroll
  for (int k = 0; k < D / 32; ++k) hopper::keep(x.q[k]);
#pragma unroll
  for (int i = 0; i < D / 2; ++i) x.o[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kPrefillKeys / 4; ++i) x.p[i / 4][i % 4] = 0;
  float even[kScores], odd[kScores];
#pragma unroll
  for (int i = 0; i < kScores; ++i) even[i] = odd[i] = 0.0f;
  begin<D>(shared, x, rows, tiles, even, odd);
  if (group == 1 && tiles.count > 1) give_turn(0);
  for (int j = 1; j < tiles.count; ++j) {
    consume<D>(shared, x, rows, group, tiles, j, odd, even);
    if (++j == tiles.count) break;
    consume<D>(shared, x, rows, group, tiles, j, even, odd);
  }
  const int last = tiles.first + tiles.count - 1;
  fence<D>(x, even);
  issue_sums<D>(x.o, x.p, shared.values[stage_of(last)]);
  hopper::wgmma_commit();
  hopper::wgmma_wait<0>();
  hopper::keep(x.o);
  release(shared, last);
}

// Through shared memory, so that rows go out in whole vectors and in the natural order of the head.
template <int D>
TILEWRIGHT_DEVICE void write_rows(const Attention& p, const PrefillItem& item, PrefillShared<D>& shared,
                                  const Operands<D>& x, const RowState& rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4;
  float normalizer[kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const float total = warp_sum(rows.total[i], 4);
    normalizer[i] = total == 0.0f ? 0.0f : 1.0f / total;
  }
#pragma unroll
  for (int i = 0; i < D / 2; ++i) {
    const int row = i / 2 % 2;
    shared.out[thread_row(row)][8 * (i / 4) + t + 4 * (i % 2)] = x.o[i] * normalizer[row];
  }
  __syncwarp();
  const int first = thread_row(0) - lane / 4;
  for (int i = lane; i < 16 * D / 4; i += kWarp) {
    const int r = first + i / (D / 4), d = i % (D / 4) * 4;
    if (!item.exists(r) || d >= p.cache.head_dim) continue;
    store_four(p, out_row(p, item.token(r), item.head(r)) + d, &shared.out[r][d]);
  }
}

// The rows of a sequence whose length does not fit, by the consumers.
TILEWRIGHT_DEVICE void spoil_rows(const Attention& p, const PrefillItem& item) {
  const int head_dim = static_cast<int>(p.cache.head_dim), rows = item.tokens * item.group;
  for (int i = static_cast<int>(threadIdx.x) - kProducers; i < rows * head_dim; i += kConsumerGroups * kProducers) {
    const int r = i / head_dim;
    set_element(p.out, p.q.type, out_row(p, item.token(r), item.head(r)) + i % head_dim, not_a_number());
  }
}

// A block's items, the longest first: dealt to and fro, so that all blocks get about the same work.
struct PrefillWalk {
  int round = 0, items;

  TILEWRIGHT_DEVICE bool next(const Attention& p, PrefillItem& item) {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    for (; round * blocks < items; ++round) {
      const int index = round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
      if (index >= items) continue;
      const Place place = find_item<PrefillCount>(p, index);
      // Broadcast, so that the compiler knows that a warp agrees: it keeps products in flight only then.
      item = prefill_item(p, {__shfl_sync(kAllLanes, place.sequence, 0), __shfl_sync(kAllLanes, place.index, 0)});
      ++round;
      return true;
    }
    return false;
  }
};

template <int D>
TILEWRIGHT_DEVICE void run_producer(const Attention& p, PrefillShared<D>& shared, PrefillWalk walk) {
  PrefillItem item{};
  for (int n = 0; walk.next(p, item);) {
    if (!item.sequence.valid()) continue;
    const PrefillSource source = source_of(p, item);
    produce<D>(shared, source, n);
    n += source.tiles;
  }
}

template <int D>
TILEWRIGHT_DEVICE void run_consumer(const Attention& p, PrefillShared<D>& shared, PrefillWalk walk, int group) {
  PrefillItem item{};
  for (int n = 0; walk.next(p, item);) {
    if (!item.sequence.valid()) {
      spoil_rows(p, item);
      continue;
    }
    const PrefillSource source = source_of(p, item);
    const Tiles tiles{__shfl_sync(kAllLanes, source.tiles, 0), n};
    Operands<D> operands;
    RowState rows;
    init_rows(p, item, source.end, rows);
    load_queries<D>(p, item, rows, operands.q);
    consume_all<D>(shared, tiles, group, operands, rows);
    write_rows<D>(p, item, shared, operands, rows);
    n += tiles.count;
  }
}

template <int D>
__global__ void __launch_bounds__(kPrefillThreads, 1) prefill_attention(const __grid_constant__ Attention p) {
  auto& shared = *reinterpret_cast<PrefillShared<D>*>(hopper::shared_memory());
  clear_tail(p);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      hopper::init(shared.full[s], kProducers);
      hopper::init(shared.empty[s], kConsumerGroups * kProducers / kWarp);
    }
    hopper::fence_barrier_init();
  }
  __syncthreads();
  const PrefillWalk walk{0, count_items<PrefillCount>(p)};
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kProducers, 0);
  if (group == 0) {
    hopper::lower_registers<kProducerRegisters>();
    run_producer<D>(p, shared, walk);
  } else {
    hopper::raise_registers<kConsumerRegisters>();
    run_consumer<D>(p, shared, walk, group - 1);
  }
}

}  // namespace tilewright::int4_fp8_attention::cuda
