// SPDX-License-Identifier: Apache-2.0
// Of the kernel that takes states through the chunks: what its warpgroups share, and the one that helps. See
// forward_states.cuh.
#pragma once

#include "hopper/hopper.h"
#include "ops/linear_attention/cuda/gates.cuh"
#include "ops/linear_attention/cuda/plan.h"

namespace tilewright::linear_attention::cuda {

inline constexpr int kMaxStages = 3;
inline constexpr int kHelperBarrier = 1;
// Of two warpgroups with half of the keys each: reads are written, and read; outputs are written, and read.
inline constexpr int kReadsWritten = 2, kReadsRead = 3, kOutputsWritten = 4, kOutputsRead = 5;
// Of 168 registers a thread that three warpgroups start with. Where scores come prepared, the helper needs fewer.
constexpr int consumer_registers(bool channel) { return channel ? 224 : 208; }
constexpr int helper_registers(bool channel) { return channel ? 56 : 88; }

template <class In>
struct StatesParams {
  Problem<In, float> problem;
  Prepared from;
  hopper::TensorMap q, k, v;  // [K or V, heads, tokens, batch]; q and k are not read with a decay a channel
  int groups;  // of 64 columns of V, that a block has
  int tiles;  // blocks that share the columns of V
  int stages;
};

namespace states {

using hopper::Swizzle;
using hopper::Wgmma;

// What a token's row and column of a chunk are multiplied by. Behind `write`, which prepared chunks begin with, lie their
// channels' `whole`.
struct Factors {
  float write[kChunk];
  float into[kChunk], query[kChunk];
  float sum[kChunk], beta[kChunk];
};

template <class In, int kKeys, bool kDelta, bool kChannel>
struct Layout {
  using KeyTile = hopper::Tile<In, kChunk, kKeys, Swizzle::k128>;
  using Square = hopper::Tile<In, kChunk, kChunk, Swizzle::k128>;  // inverse, scores, values of a warpgroup
  static constexpr int kReads = 0;
  static constexpr int kQueries = kReads + (kDelta || !kChannel ? KeyTile::kBytes : 0);
  static constexpr int kWrites = kChannel ? kQueries + KeyTile::kBytes : kReads;
  static constexpr int kScores = kQueries + (kChannel ? 2 : 1) * KeyTile::kBytes;
  static constexpr int kInverse = kScores + Square::kBytes;
  static constexpr int kFactors = kInverse + (kDelta ? Square::kBytes : 0);
  static constexpr int kPreparedFactors = (kChunk + kKeys) * 4;
  static constexpr int kValues = kFactors + 2048;
  static_assert(kPreparedFactors <= 2048 && sizeof(Factors) <= 2048);

  // Two warpgroups have half of more than 128 keys each, and tell each other their sums over them.
  static constexpr bool kSplit = kKeys > 128;
  static constexpr int kOwnKeys = kSplit ? kKeys / 2 : kKeys;
  static constexpr int kExchange = kSplit ? 2 * kChunk * kGroupColumns * 4 : 0;
  static_assert(!kSplit || !kChannel);

  static constexpr int consumers(int groups) { return kSplit ? 2 : groups; }
  static constexpr int stage_bytes(int groups) { return kValues + groups * Square::kBytes; }
  // Behind the stages lie what is exchanged, and the barriers.
  static constexpr int bytes(int groups, int stages) {
    return stages * stage_bytes(groups) + kExchange + 3 * kMaxStages * 8;
  }
};

// Of each stage: tiles have come; scores and factors are made; everything is used.
struct Barriers {
  hopper::Barrier full[kMaxStages], ready[kMaxStages], empty[kMaxStages];
};

struct Ring {
  int stage = 0, stages;
  uint32_t phase = 0;

  TILEWRIGHT_DEVICE explicit Ring(int count) : stages(count) {}
  TILEWRIGHT_DEVICE void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A block's work: tokens [first, first + tokens) of a batch row, whose first chunk has the place `place`. In 32 bits, as
// the copy engine's coordinates; offsets in memory are not.
struct Task {
  int batch, first, tokens, place;
  int n, head, key_head;
  int column;  // of V, its first

  TILEWRIGHT_DEVICE int chunks() const { return (tokens + kChunk - 1) / kChunk; }
  TILEWRIGHT_DEVICE int token(int chunk) const { return first + chunk * kChunk; }
  TILEWRIGHT_DEVICE int rows(int chunk) const { return min(tokens - chunk * kChunk, kChunk); }
};

template <class In>
TILEWRIGHT_DEVICE Task task_of(const StatesParams<In>& params) {
  const Problem<In, float>& p = params.problem;
  const int value_heads = static_cast<int>(p.value_heads), block = static_cast<int>(blockIdx.x);
  const int pair = block / params.tiles;
  Task task{};
  task.n = pair / value_heads;
  task.head = pair % value_heads;
  task.key_head = static_cast<int>(p.key_head(task.head));
  const Sequence sequence = sequence_of(p.sequences, task.n);
  task.batch = static_cast<int>(sequence.batch);
  task.first = static_cast<int>(sequence.first);
  task.tokens = static_cast<int>(sequence.tokens);
  task.place = static_cast<int>(sequence.place);
  task.column = block % params.tiles * params.groups * kGroupColumns;
  return task;
}

// Rows of one head that end before the chunk does, by a warpgroup; zero behind the end and behind `size`.
template <class Tile, class In>
TILEWRIGHT_DEVICE void copy_rows(const Rows<const In>& rows, int64_t batch, int64_t first, int64_t head, int count,
                                 int64_t column, int64_t size, char* tile) {
  constexpr int kPieces = Tile::kCols / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 128; i < kChunk * kPieces; i += 128) {
    const int row = i / kPieces, within = i % kPieces * 8;
    hopper::U128 piece{0, 0, 0, 0};
    if (row < count && column + within < size) {
      piece = hopper::load_16(rows.row(batch, first + row, head) + column + within);
    }
    hopper::store_16(Tile::at(tile, row, within), piece);
  }
}

template <class In, int kKeys, bool kDelta, bool kChannel>
struct Helper {
  using At = Layout<In, kKeys, kDelta, kChannel>;
  using KeyTile = typename At::KeyTile;
  using Square = typename At::Square;
  using Product = Wgmma<In, In, kChunk>;
  const StatesParams<In>& params;
  const Task& task;
  char* stages;
  Barriers& barriers;

  TILEWRIGHT_DEVICE char* stage_at(int stage) const { return stages + stage * At::stage_bytes(params.groups); }

  // ---- bringing tiles

  // What the first kernel left for a chunk, and how many bytes that is.
  TILEWRIGHT_DEVICE uint32_t prepared_bytes() const {
    const uint32_t keys = kChannel ? (kDelta ? 3 : 2) * KeyTile::kBytes + Square::kBytes + At::kPreparedFactors : 0;
    return keys + (kDelta ? Square::kBytes : 0);
  }

  TILEWRIGHT_DEVICE void load_prepared(int chunk, char* stage, hopper::Barrier& full) const {
    const Prepared& from = params.from;
    const int64_t index = static_cast<int64_t>(task.place + chunk) * params.problem.value_heads + task.head;
    if constexpr (kDelta) {
      hopper::load_bulk(stage + At::kInverse, from.square(from.inverse, index), Square::kBytes, full);
    }
    if constexpr (kChannel) {
      if constexpr (kDelta) {
        hopper::load_bulk(stage + At::kReads, from.keys(from.reads, index), KeyTile::kBytes, full);
      }
      hopper::load_bulk(stage + At::kQueries, from.keys(from.queries, index), KeyTile::kBytes, full);
      hopper::load_bulk(stage + At::kWrites, from.keys(from.writes, index), KeyTile::kBytes, full);
      hopper::load_bulk(stage + At::kScores, from.square(from.scores, index), Square::kBytes, full);
      hopper::load_bulk(stage + At::kFactors, from.row(index), At::kPreparedFactors, full);
    }
  }

  TILEWRIGHT_DEVICE void load_full(int chunk, char* stage, hopper::Barrier& full) const {
    const int at = task.token(chunk);
    const uint32_t keys = kChannel ? 0 : 2 * KeyTile::kBytes;
    hopper::arrive_expect(full, prepared_bytes() + keys + static_cast<uint32_t>(params.groups * Square::kBytes));
    if constexpr (!kChannel) {
      const int head = task.key_head;
#pragma unroll
      for (int panel = 0; panel < KeyTile::kPanels; ++panel) {
        const int within = panel * KeyTile::kBytesPerPanel, column = panel * KeyTile::kPanelCols;
        hopper::load_tile(stage + At::kReads + within, params.k, full, column, head, at, task.batch);
        hopper::load_tile(stage + At::kQueries + within, params.q, full, column, head, at, task.batch);
      }
    }
    load_prepared(chunk, stage, full);
    for (int group = 0; group < params.groups; ++group) {
      hopper::load_tile(stage + At::kValues + group * Square::kBytes, params.v, full,
                        task.column + group * kGroupColumns, task.head, at, task.batch);
    }
  }

  TILEWRIGHT_DEVICE void load_part(int chunk, char* stage, hopper::Barrier& full) const {
    const Problem<In, float>& p = params.problem;
    const int batch = task.batch, token = task.token(chunk), rows = task.rows(chunk);
    if constexpr (!kChannel) {
      copy_rows<KeyTile>(p.k, batch, token, task.key_head, rows, 0, p.key_size, stage + At::kReads);
      copy_rows<KeyTile>(p.q, batch, token, task.key_head, rows, 0, p.key_size, stage + At::kQueries);
    }
    for (int group = 0; group < params.groups; ++group) {
      copy_rows<Square>(p.v, batch, token, task.head, rows, task.column + group * kGroupColumns, p.value_size,
                        stage + At::kValues + group * Square::kBytes);
    }
    hopper::fence_async_shared();
    hopper::named_sync(kHelperBarrier, 128);
    if (threadIdx.x % 128 != 0) return;
    if constexpr (kDelta || kChannel) {
      hopper::arrive_expect(full, prepared_bytes());
      load_prepared(chunk, stage, full);
    } else {
      hopper::arrive(full);
    }
  }

  TILEWRIGHT_DEVICE void load(int chunk, const Ring& ring) const {
    const bool part = task.rows(chunk) < kChunk;
    if (!part && threadIdx.x % 128 != 0) return;
    hopper::wait(barriers.empty[ring.stage], ring.phase ^ 1);
    if (part) {
      load_part(chunk, stage_at(ring.stage), barriers.full[ring.stage]);
    } else {
      load_full(chunk, stage_at(ring.stage), barriers.full[ring.stage]);
    }
  }

  // ---- scores and factors

  TILEWRIGHT_DEVICE TokenGates gates_of(int chunk) const {
    return fetch_gates<kDelta>(params.problem, task.batch, task.token(chunk), task.rows(chunk), task.head);
  }

  // By one warp.
  TILEWRIGHT_DEVICE void store_factors(const TokenGates& gates, Factors& factors) const {
    const int token = 2 * (static_cast<int>(threadIdx.x) % 32);
    float sums[2];
    const float all = sum_gates(gates, sums);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float into = exp2f(sums[i]);
      factors.write[token + i] = gates.beta[i] * exp2f(all - sums[i]);
      factors.into[token + i] = into;
      factors.query[token + i] = params.problem.scale * into;
      factors.sum[token + i] = sums[i];
      factors.beta[token + i] = params.problem.scale * gates.beta[i];
    }
  }

  // Q K^T, masked and rounded.
  TILEWRIGHT_DEVICE void make_scores(char* stage, const TokenGates& gates) const {
    auto& factors = *reinterpret_cast<Factors*>(stage + At::kFactors);
    const int thread = static_cast<int>(threadIdx.x) % 128;
    float qk[32];
    hopper::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys; k += Product::kDepth) {
      Product::run(qk, KeyTile::k_major(stage + At::kQueries, 0, k), KeyTile::k_major(stage + At::kReads, 0, k), k > 0);
    }
    hopper::wgmma_commit();
    if (thread < 32) store_factors(gates, factors);
    hopper::named_sync(kHelperBarrier, 128);
    hopper::wgmma_wait<0>();
    hopper::keep(qk);
    // Of this thread's numbers: row and column of the first; how far the others lie from it is known.
    const int row = hopper::accumulator_row(thread, 0), column = hopper::accumulator_col(thread, 0), lane = thread % 32;
    const float sums[2] = {factors.sum[row], factors.sum[row + 8]};
    const float *column_sums = factors.sum + column, *weights = factors.beta + column;
    const int to = thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int step = 0; step < kChunk / 16; ++step) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float score[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int down = w % 2 * 8, right = 16 * step + w / 2 * 8 + c;
          const bool seen = row - column >= right - down;
          // Above the diagonal the exponent would be positive.
          const float decay = exp2f(seen ? sums[w % 2] - column_sums[right] : 0.0f);
          score[c] = seen ? qk[8 * step + 2 * w + c] * decay * weights[right] : 0.0f;
        }
        words[w] = hopper::pack_pair<In>(score[0], score[1]);
      }
      hopper::stmatrix_x4(Square::at(stage + At::kScores, to, 16 * step + lane / 16 * 8), words);
    }
    hopper::fence_async_shared();
  }

  TILEWRIGHT_DEVICE void run() const {
    const int chunks = task.chunks(), ahead = params.stages - 1;
    Ring loading(params.stages), making(params.stages);
    int loaded = 0;
    for (; loaded < ahead && loaded < chunks; ++loaded, loading.advance()) load(loaded, loading);
    TokenGates next{};
    if (!kChannel && chunks > 0) next = gates_of(0);
    for (int c = 0; c < chunks; ++c, making.advance()) {
      if constexpr (!kChannel) {
        const TokenGates gates = next;
        if (c + 1 < chunks) next = gates_of(c + 1);
        hopper::wait(barriers.full[making.stage], making.phase);
        make_scores(stage_at(making.stage), gates);
        hopper::arrive(barriers.ready[making.stage]);
      }
      if (loaded < chunks) {
        load(loaded, loading);
        ++loaded;
        loading.advance();
      }
      // The copies' thread waits for stages alone. Without scores to make, the others would run ahead of it to the last
      // chunk's rows, and find its stage free by the parity of a phase long past.
      if constexpr (kChannel) hopper::named_sync(kHelperBarrier, 128);
    }
  }
};

}  // namespace states
}  // namespace tilewright::linear_attention::cuda
