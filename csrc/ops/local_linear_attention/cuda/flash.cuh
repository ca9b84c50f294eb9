// SPDX-License-Identifier: Apache-2.0
// What the passes of the tensor-core form share. A block of threads takes 128 queries of one head, two warpgroups of 64
// rows; a third warpgroup streams tiles of keys (and values) through a ring in shared memory by TMA. Products are wgmma in
// 16 bits with float32 sums; thread t of a warpgroup holds rows t/4 % 8 and that + 8 of its warp's 16 (hopper/wgmma.h).
//
// Keys that not all 128 rows see (the last tiles of a causal block, the first of a window, the end of a sequence) are
// cleaned in shared memory: what lies outside the sequence or is not finite becomes zero, since it would meet the weight 0
// of rows that do not see it; rows that do see a key that is not finite are marked.
#pragma once

#include "ops/local_linear_attention/cuda/sequences.cuh"

namespace tilewright::local_linear_attention::cuda {

inline constexpr int kGroupRows = 64;
inline constexpr int kGroups = 2;
inline constexpr int kBlockRows = kGroups * kGroupRows;
inline constexpr int kConsumers = kGroups * 128;
inline constexpr int kFlashThreads = kConsumers + 128;
inline constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
inline constexpr int kCleanBarrier = 1, kDecisionBarrier = 2, kGroupBarrier = 3;  // and 4
inline constexpr float kLog2E = 1.4426950408889634f;

// A barrier of part of the block. Lanes come back together first: a warp that arrives in pieces counts more than once.
TILEWRIGHT_DEVICE void meet(int barrier, int threads) {
  __syncwarp();
  hopper::named_sync(barrier, threads);
}

// 128 queries of one sequence, and the tiles of keys that they see.
struct QueryBlock {
  Segment segment;
  int64_t first;  // query within the segment
  int queries;  // of the segment's, at most kBlockRows; 0: nothing to do
  int common_begin, common_end;  // keys that all rows see
  int first_tile, last_tile;
  int group_first[kGroups], group_last[kGroups];  // of them, those that the rows of a warpgroup see
};

template <class T, int D>
struct FlashShape {
  static constexpr int kKeys = D == 64 ? 96 : 64;  // of a tile: what the registers of three products hold
  static constexpr int kStages = D == 64 ? 6 : 4;
  static constexpr int kOwn = D / 2;  // numbers of a row vector that a thread holds, for its two rows
  static constexpr auto kSwizzle = hopper::Swizzle::k128;
  using KeyTile = hopper::Tile<T, kKeys, D, kSwizzle>;
  using RowTile = hopper::Tile<T, kGroupRows, D, kSwizzle>;
  static constexpr int kPanelCols = RowTile::kPanelCols;

  // Byte offsets into shared memory.
  static constexpr int kQuery = 0;
  static constexpr int kLeft = kQuery + kGroups * RowTile::kBytes;  // left operand of the second product: p, or x
  static constexpr int kRing = kLeft + kGroups * RowTile::kBytes;
  static constexpr int kResidual = kRing + kStages * KeyTile::kBytes;  // [kOwn][kConsumers] float, each thread's own
  static constexpr int kMean = kResidual + kOwn * kConsumers * 4;  // [kOwn / 2][kConsumers] pairs of T
  static constexpr int kNumbers = kMean + kOwn * kConsumers * 2;  // [4][kBlockRows] float, see RowNumber
  static constexpr int kMarks = kNumbers + 4 * kBlockRows * 4;  // [kBlockRows] int
  static constexpr int kFlags = kMarks + kBlockRows * 4;  // [2][8] int: whether a warp has rows to solve
  static constexpr int kPlace = kFlags + 2 * 8 * 4;  // [2] int64: sequence and block of queries
  static constexpr int kBlock = kPlace + 16;  // QueryBlock
  static constexpr int kBarriers = kBlock + 96;
  static constexpr int kBytes = kBarriers + (2 * kStages + 1) * 8;
  static_assert(kBytes <= hopper::kMaxSharedBytes && sizeof(QueryBlock) <= 96);
};

template <int Keys>
TILEWRIGHT_DEVICE QueryBlock query_block(const Options& o, const Segment& s, int64_t block) {
  QueryBlock b{};
  b.segment = s;
  b.first = block * kBlockRows;
  const int64_t rest = s.queries - b.first;
  if (rest <= 0) return b;
  b.queries = static_cast<int>(rest < kBlockRows ? rest : kBlockRows);
  const Range first = visible_keys(o, s, b.first), last = visible_keys(o, s, b.first + b.queries - 1);
  b.common_begin = static_cast<int>(last.begin);
  b.common_end = static_cast<int>(first.end > 0 ? first.end : 0);
  b.first_tile = static_cast<int>(first.begin / Keys);
  const int64_t end = last.end > first.begin ? last.end : first.begin;
  b.last_tile = static_cast<int>((end + Keys - 1) / Keys);
  if (end == first.begin) b.last_tile = b.first_tile;
  for (int group = 0; group < kGroups; ++group) {
    const int from = group * kGroupRows, to = from + kGroupRows < b.queries ? from + kGroupRows : b.queries;
    b.group_first[group] = b.group_last[group] = b.first_tile;
    if (from >= to) continue;
    const Range low = visible_keys(o, s, b.first + from), high = visible_keys(o, s, b.first + to - 1);
    if (high.end <= low.begin) continue;
    b.group_first[group] = static_cast<int>(low.begin / Keys);
    b.group_last[group] = static_cast<int>((high.end + Keys - 1) / Keys);
  }
  return b;
}

// Which block of which sequence: of equal sequences the last blocks first, as they have the most keys; packed ones are
// found by the first warp, 32 sequences at a time. Of blocks of keys the first ones come first. All threads of the block
// call it.
template <bool Keys>
TILEWRIGHT_DEVICE void find_block(const Sequences& s, int64_t index, int64_t* place) {
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    if (s.offsets == nullptr) {
      const int64_t blocks = ((Keys ? s.keys : s.queries) + kBlockRows - 1) / kBlockRows;
      if (lane == 0) {
        place[0] = index % s.count;
        place[1] = Keys ? index / s.count : blocks - 1 - index / s.count;
      }
    } else {
      if (lane == 0) place[0] = -1;
      int64_t before = 0;
      for (int64_t first = 0; first < s.count && before <= index; first += 32) {
        const int64_t own =
            first + lane < s.count ? (segment(s, first + lane).queries + kBlockRows - 1) / kBlockRows : 0;
        int64_t sum = own;
        for (int step = 1; step < 32; step *= 2) {
          const int64_t other = __shfl_up_sync(0xffffffffu, sum, static_cast<unsigned>(step));
          if (lane >= step) sum += other;
        }
        const int64_t begin = before + sum - own;
        __syncwarp();
        if (begin <= index && index < begin + own) {
          place[0] = first + lane;
          place[1] = Keys ? index - begin : own - 1 - (index - begin);
        }
        before += __shfl_sync(0xffffffffu, sum, 31);
      }
    }
  }
  __syncthreads();
}

// By all threads: barriers, marks, and the block's queries. False where there are none.
template <class T, int D>
TILEWRIGHT_DEVICE bool open_block(const Options& options, const Sequences& sequences, char* memory) {
  using S = FlashShape<T, D>;
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriers);
  auto* place = reinterpret_cast<int64_t*>(memory + S::kPlace);
  for (int i = static_cast<int>(threadIdx.x); i < kBlockRows; i += kFlashThreads) {
    reinterpret_cast<int*>(memory + S::kMarks)[i] = 0;
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      hopper::init(barriers[stage], 1);
      hopper::init(barriers[S::kStages + stage], kConsumers / 32);
    }
    hopper::init(barriers[2 * S::kStages], 1);
    hopper::fence_barrier_init();
  }
  find_block<false>(sequences, blockIdx.x, place);
  if (place[0] < 0) return false;
  auto* block = reinterpret_cast<QueryBlock*>(memory + S::kBlock);
  if (threadIdx.x == 0) *block = query_block<S::kKeys>(options, segment(sequences, place[0]), place[1]);
  __syncthreads();
  return block->queries > 0;
}

// The ring as consumers and producer see it.
template <class T, int D>
struct Ring {
  using S = FlashShape<T, D>;
  char* tiles;
  hopper::Barrier *full, *empty;
  hopper::PipelineState<S::kStages> at;

  TILEWRIGHT_DEVICE char* tile(int stage) const { return tiles + stage * S::KeyTile::kBytes; }
};

template <class T, int D>
TILEWRIGHT_DEVICE Ring<T, D> make_ring(char* memory) {
  using S = FlashShape<T, D>;
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriers);
  return {memory + S::kRing, barriers, barriers + S::kStages, {}};
}

// By one thread. A tile is kKeys rows of one head from a row of the whole tensor on; what lies outside it is zero.
template <class T, int D>
TILEWRIGHT_DEVICE void load_keys(Ring<T, D>& ring, const hopper::TensorMap& map, int head, int64_t row) {
  using S = FlashShape<T, D>;
  hopper::wait(ring.empty[ring.at.stage], ring.at.phase ^ 1);
  hopper::Barrier& full = ring.full[ring.at.stage];
  hopper::arrive_expect(full, S::KeyTile::kBytes);
  char* to = ring.tile(ring.at.stage);
#pragma unroll
  for (int panel = 0; panel < S::KeyTile::kPanels; ++panel) {
    hopper::load_tile(to + panel * S::KeyTile::kBytesPerPanel, map, full, panel * S::kPanelCols, head,
                      static_cast<int>(row));
  }
  ring.at.advance();
}

// A tile of 64 rows for each group.
template <class T, int D>
TILEWRIGHT_DEVICE void load_rows(const hopper::TensorMap& map, char* to, hopper::Barrier& full, const QueryBlock& block,
                                 int head) {
  using S = FlashShape<T, D>;
  for (int group = 0; group < kGroups; ++group) {
    for (int panel = 0; panel < S::RowTile::kPanels; ++panel) {
      hopper::load_tile(to + group * S::RowTile::kBytes + panel * S::RowTile::kBytesPerPanel, map, full,
                        panel * S::kPanelCols, head,
                        static_cast<int>(block.segment.first_query + block.first) + group * kGroupRows);
    }
  }
}

template <class T>
TILEWRIGHT_DEVICE bool has_infinity(uint32_t word) {
  constexpr uint32_t kExponent = std::is_same_v<T, hopper::bf16> ? 0x7f80u : 0x7c00u;
  return (word & kExponent) == kExponent || (word & (kExponent << 16)) == kExponent << 16;
}

struct Seen {
  int begin[2], end[2];
};

// What is kept of a row between walks.
enum class RowNumber : int { kLambda = 0, kLimit = 1, kSquare = 2, kCount = 3 };  // kLimit: |residual|^2 to stop at

// A thread of a consumer warpgroup: its two rows h = 0, 1.
template <class T, int D>
struct Consumer {
  using S = FlashShape<T, D>;
  char* memory;
  const Options* options;
  const QueryBlock& block;  // in shared memory: it is needed rarely
  Ring<T, D> ring;
  int thread, group;  // of 128; of kGroups

  // From here on, addresses of the thread's elements are formed anew: kept through a loop over tiles they would take the
  // registers that its products need.
  TILEWRIGHT_DEVICE void forget_addresses() {
    uint32_t value[1] = {static_cast<uint32_t>(thread)};
    hopper::keep(value);
    thread = static_cast<int>(value[0]);
  }
  TILEWRIGHT_DEVICE int row_of(int i) const { return (i / 2) % 2; }  // which of the two rows register i belongs to
  TILEWRIGHT_DEVICE int local_row(int i) const { return hopper::accumulator_row(thread, i); }
  TILEWRIGHT_DEVICE int col(int i) const { return hopper::accumulator_col(thread, i); }
  TILEWRIGHT_DEVICE int row(int h) const { return group * kGroupRows + hopper::accumulator_row(thread, 2 * h); }
  TILEWRIGHT_DEVICE bool valid(int h) const { return row(h) < block.queries; }
  // Index into [N, HQ]; the grid's second dimension is the head.
  TILEWRIGHT_DEVICE int64_t at(int h, const Shape& shape) const {
    return (block.segment.first_query + block.first + row(h)) * shape.heads + blockIdx.y;
  }
  TILEWRIGHT_DEVICE char* row_tile(int at) const { return memory + at + group * S::RowTile::kBytes; }
  TILEWRIGHT_DEVICE float& residual(int i) const {
    return reinterpret_cast<float*>(memory + S::kResidual)[i * kConsumers + group * 128 + thread];
  }
  TILEWRIGHT_DEVICE uint32_t& mean(int pair) const {
    return reinterpret_cast<uint32_t*>(memory + S::kMean)[pair * kConsumers + group * 128 + thread];
  }
  // The pair of elements i, i + 1 (i even) of a row tile.
  TILEWRIGHT_DEVICE uint32_t& pair(int tile, int i) const {
    return *reinterpret_cast<uint32_t*>(S::RowTile::at(row_tile(tile), local_row(i), col(i)));
  }
  TILEWRIGHT_DEVICE int* marks() const { return reinterpret_cast<int*>(memory + S::kMarks); }
  TILEWRIGHT_DEVICE bool whole(int tile) const {
    return block.common_begin <= tile * S::kKeys && (tile + 1) * S::kKeys <= block.common_end;
  }
  // Keys that the two rows see. Rows behind the last query see what that one sees, and are not written.
  TILEWRIGHT_DEVICE Seen seen() const {
    Seen result;
    for (int h = 0; h < 2; ++h) {
      const int last = block.queries - 1, query = row(h) < last ? row(h) : last;
      const Range range = visible_keys(*options, block.segment, block.first + query);
      result.begin[h] = static_cast<int>(range.begin);
      result.end[h] = static_cast<int>(range.end);
    }
    return result;
  }
  TILEWRIGHT_DEVICE bool sees(const Seen& seen, int i, int tile) const {
    const int key = tile * S::kKeys + col(i);
    return seen.begin[row_of(i)] <= key && key < seen.end[row_of(i)];
  }
  // One of a row's four threads writes; __syncwarp() before the others read.
  TILEWRIGHT_DEVICE float number(RowNumber which, int h) const {
    return reinterpret_cast<const float*>(memory + S::kNumbers)[static_cast<int>(which) * kBlockRows + row(h)];
  }
  TILEWRIGHT_DEVICE void set_number(RowNumber which, int h, float value) const {
    if (thread % 4 != 0) return;
    reinterpret_cast<float*>(memory + S::kNumbers)[static_cast<int>(which) * kBlockRows + row(h)] = value;
  }
};

template <class T, int D>
TILEWRIGHT_DEVICE Consumer<T, D> make_consumer(char* memory, const Options& options) {
  using S = FlashShape<T, D>;
  const auto& block = *reinterpret_cast<const QueryBlock*>(memory + S::kBlock);
  Consumer<T, D> c{memory, &options, block, make_ring<T, D>(memory)};
  c.thread = static_cast<int>(threadIdx.x) % 128;
  c.group = static_cast<int>(threadIdx.x) / 128 - 1;
  return c;
}

// One of the Parts threads of a key's row.
template <class T, int D, int Parts>
TILEWRIGHT_DEVICE void clean_part(const Consumer<T, D>& c, int stage, int tile, int key_row, int part, bool mark) {
  using S = FlashShape<T, D>;
  const int key = tile * S::kKeys + key_row;
  const bool outside = key >= c.block.segment.keys;
  char* at[4];
  bool bad = outside;
  for (int i = 0; i < 4; ++i) {
    at[i] = reinterpret_cast<char*>(S::KeyTile::at(c.ring.tile(stage), key_row, part * 32 + i * 8));
    const hopper::U128 words = hopper::load_16(at[i]);
    bad = bad || has_infinity<T>(words.x) || has_infinity<T>(words.y) || has_infinity<T>(words.z) ||
          has_infinity<T>(words.w);
  }
  int any = bad ? 1 : 0;
  for (int offset = 1; offset < Parts; offset *= 2) any |= __shfl_xor_sync(0xffffffffu, any, offset);
  if (any != 0) {
    for (int i = 0; i < 4; ++i) hopper::store_16(at[i], hopper::U128{0, 0, 0, 0});
    if (mark && !outside && part == 0) {
      const Range seeing = seeing_queries(*c.options, c.block.segment, key);
      const int64_t begin = clamp(seeing.begin - c.block.first, 0, c.block.queries);
      const int64_t end = clamp(seeing.end - c.block.first, 0, c.block.queries);
      for (int64_t row = begin; row < end; ++row) atomicAdd(c.marks() + row, 1);
    }
  }
}

// By all consumers: 32 columns of a row a thread.
template <class T, int D>
TILEWRIGHT_DEVICE void clean(const Consumer<T, D>& c, int stage, int tile, bool mark) {
  using S = FlashShape<T, D>;
  constexpr int kParts = D / 32;
  static_assert(kParts * S::kKeys <= kConsumers && kParts * S::kKeys % 32 == 0, "whole warps have something to do");
  const int thread = c.group * 128 + c.thread;
  if (thread < kParts * S::kKeys) clean_part<T, D, kParts>(c, stage, tile, thread / kParts, thread % kParts, mark);
  hopper::fence_async_shared();
  meet(kCleanBarrier, kConsumers);
}

// A warp is done with a stage.
template <class T, int D>
TILEWRIGHT_DEVICE void release(const Consumer<T, D>& c, int stage) {
  __syncwarp();
  if (c.thread % 32 == 0) hopper::arrive(c.ring.empty[stage]);
}

template <class T, int D>
TILEWRIGHT_DEVICE void await(Consumer<T, D>& c, int tile, bool mark) {
  hopper::wait(c.ring.full[c.ring.at.stage], c.ring.at.phase);
  if (!c.whole(tile)) clean(c, c.ring.at.stage, tile, mark);
}

// to[64, Keys] = row tile x keys^T, or that added to it; not waited for.
template <class T, int D>
TILEWRIGHT_DEVICE void project(const Consumer<T, D>& c, int row_tile, const char* keys,
                               float (&to)[FlashShape<T, D>::kKeys / 2], bool add = false) {
  using S = FlashShape<T, D>;
  using Product = hopper::Wgmma<T, T, S::kKeys>;
#pragma unroll
  for (int k = 0; k < D; k += Product::kDepth) {
    Product::run(to, S::RowTile::k_major(c.row_tile(row_tile), 0, k), S::KeyTile::k_major(keys, 0, k), add || k > 0);
  }
}

// sums[64, D] += factors[64, Keys] x rows of a tile, not waited for.
template <class T, int D>
TILEWRIGHT_DEVICE void collect(const uint32_t (&factors)[FlashShape<T, D>::kKeys / 16][4], const char* tile,
                               float (&sums)[D / 2]) {
  using S = FlashShape<T, D>;
  using Product = hopper::Wgmma<T, T, D, hopper::Major::kK, hopper::Major::kMN>;
#pragma unroll
  for (int step = 0; step < S::kKeys / 16; ++step) {
    Product::run(sums, factors[step], S::KeyTile::mn_major(tile, step * 16, 0), true);
  }
}

// Two neighbours of a row in global memory.
struct alignas(8) FloatPair {
  float low, high;
};

// Sum or maximum over the four threads that share a row.
TILEWRIGHT_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
TILEWRIGHT_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The numbers of a tile, rounded, as the left operand of the next product; sums gets the sums of the rounded ones.
template <class T, int Count>
TILEWRIGHT_DEVICE void pack_factors(const float (&values)[Count], uint32_t (&factors)[Count / 8][4], float (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < Count; i += 2) {
    const uint32_t word = hopper::pack_pair<T>(values[i], values[i + 1]);
    factors[i / 8][i / 2 % 4] = word;
    float low, high;
    hopper::unpack_pair<T>(word, low, high);
    sums[i / 2 % 2] += low + high;
  }
}

// Until all warps of the group are here: their products have read what this one is about to write.
template <class T, int D>
TILEWRIGHT_DEVICE void join_group(const Consumer<T, D>& c) {
  meet(kGroupBarrier + c.group, 128);
}

// Walks the block's tiles of keys: issue(keys) starts the products of a tile, digest(tile) works on their results,
// follow(keys) starts the products that add up.
template <class T, int D, class Issue, class Digest, class Follow>
TILEWRIGHT_DEVICE void walk_keys(Consumer<T, D>& c, bool active, bool mark, const Issue& issue, const Digest& digest,
                                 const Follow& follow) {
  const int first = active ? c.block.group_first[c.group] : c.block.last_tile;
  const int last = active ? c.block.group_last[c.group] : c.block.last_tile;
  int tile = c.block.first_tile;
  for (; tile < first; ++tile) {
    await(c, tile, mark);
    release(c, c.ring.at.stage);
    c.ring.at.advance();
  }
  if (tile < last) {
    await(c, tile, mark);
    int held = c.ring.at.stage;  // of the tile whose factors are ready
    hopper::wgmma_fence();
    issue(c.ring.tile(held));
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    digest(tile);
    c.ring.at.advance();
    // The products that add a tile up run beside the first ones of the next; none is under way where the loop turns.
    for (++tile; tile < last; ++tile) {
      await(c, tile, mark);
      const int stage = c.ring.at.stage;
      hopper::wgmma_fence();
      follow(c.ring.tile(held));
      hopper::wgmma_commit();
      issue(c.ring.tile(stage));
      hopper::wgmma_commit();
      hopper::wgmma_wait<1>();
      release(c, held);
      hopper::wgmma_wait<0>();
      digest(tile);
      held = stage;
      c.ring.at.advance();
    }
    hopper::wgmma_fence();
    follow(c.ring.tile(held));
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    release(c, held);
  }
  for (; tile < c.block.last_tile; ++tile) {
    await(c, tile, mark);
    release(c, c.ring.at.stage);
    c.ring.at.advance();
  }
  join_group(c);
  c.forget_addresses();
}

}  // namespace tilewright::local_linear_attention::cuda
