// SPDX-License-Identifier: Apache-2.0
// The chunk form's second kernel: one block for each sequence, value head and 64 or 128 columns of the state, through all
// chunks in order. Everything is transposed, so that a warpgroup keeps the whole recurrence in its registers: the state
// S^T [64 columns of V, K] is an accumulator, its rounded copy the register operand of the next products, and what they
// give is the register operand of the ones after. Only tiles of inputs come through shared memory.
//
//   X^T = S^T (reads)^T                    what the state holds under the keys      delta rule
//   W^T = (V - into X)^T (inverse)^T       what each token corrects                 additive rule: W = V
//   O^T = query (S^T (queries)^T) + W^T (scores)^T
//   S^T = whole S^T + (write W)^T (writes)
//
// One warpgroup more brings the tiles, into a ring of stages: one of its threads tells the copy engine. A sequence's last
// chunk, when it is not full, comes by ordinary loads: rows of the next sequence must not be seen, as 0 times NaN is NaN.
#pragma once

#include "hopper/hopper.h"
#include "ops/linear_attention/cuda/plan.h"

namespace tilewright::linear_attention::cuda {

inline constexpr int kMaxStages = 3;
inline constexpr int kProducerBarrier = 1;
// Of 168 registers a thread that three warpgroups start with.
inline constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;

template <class In>
struct StatesParams {
  Problem<In, float> problem;
  Prepared from;
  hopper::TensorMap q, k, v;  // [K or V, heads, tokens, batch]; q and k are not read with a decay a channel
  int groups;  // warpgroups of a block
  int tiles;  // blocks that share the columns of V
  int stages;
};

namespace states {

using hopper::Swizzle;
using hopper::Wgmma;

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
  static constexpr int kFactorBytes = (3 * kChunk + (kChannel ? kKeys : 0)) * 4;
  static constexpr int kValues = kFactors + (kChannel ? 2048 : 1024);
  static_assert(kFactorBytes <= kValues - kFactors);

  static constexpr int stage_bytes(int groups) { return kValues + groups * Square::kBytes; }
  // Barriers lie behind the stages.
  static constexpr int bytes(int groups, int stages) { return stages * stage_bytes(groups) + 2 * kMaxStages * 8; }
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

// A block's work.
struct Task {
  Sequence sequence;
  int64_t n, head, key_head;
  int column;  // of V, its first
};

template <class In>
TILEWRIGHT_DEVICE Task task_of(const StatesParams<In>& params) {
  const Problem<In, float>& p = params.problem;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) / params.tiles;
  const int tile = static_cast<int>(static_cast<int64_t>(blockIdx.x) % params.tiles);
  Task task{};
  task.n = pair / p.value_heads;
  task.head = pair % p.value_heads;
  task.key_head = p.key_head(task.head);
  task.sequence = sequence_of(p.sequences, task.n);
  task.column = tile * params.groups * kGroupColumns;
  return task;
}

// ---- the warpgroup that brings tiles

// Rows of one head that end before the chunk does, by a warpgroup; zero behind the end and behind `size`.
template <class Tile, class In>
TILEWRIGHT_DEVICE void copy_rows(const Rows<const In>& rows, int64_t batch, int64_t first, int64_t head, int count,
                                 int64_t column, int64_t size, char* tile) {
  constexpr int kPieces = Tile::kCols / 8;
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
struct Producer {
  using At = Layout<In, kKeys, kDelta, kChannel>;
  using KeyTile = typename At::KeyTile;
  using Square = typename At::Square;
  const StatesParams<In>& params;
  const Task& task;

  // What the first kernel left for this chunk; returns its bytes.
  TILEWRIGHT_DEVICE uint32_t prepared_bytes() const {
    return Square::kBytes * (kDelta ? 2 : 1) + At::kFactorBytes + (kChannel ? (kDelta ? 3 : 2) * KeyTile::kBytes : 0);
  }

  TILEWRIGHT_DEVICE void load_prepared(int64_t index, char* stage, hopper::Barrier& full) const {
    const Prepared& from = params.from;
    hopper::load_bulk(stage + At::kScores, from.square(from.scores, index), Square::kBytes, full);
    hopper::load_bulk(stage + At::kFactors, from.row(index), At::kFactorBytes, full);
    if constexpr (kDelta) {
      hopper::load_bulk(stage + At::kInverse, from.square(from.inverse, index), Square::kBytes, full);
    }
    if constexpr (kChannel) {
      if constexpr (kDelta) {
        hopper::load_bulk(stage + At::kReads, from.keys(from.reads, index), KeyTile::kBytes, full);
      }
      hopper::load_bulk(stage + At::kQueries, from.keys(from.queries, index), KeyTile::kBytes, full);
      hopper::load_bulk(stage + At::kWrites, from.keys(from.writes, index), KeyTile::kBytes, full);
    }
  }

  TILEWRIGHT_DEVICE void load_full(int64_t index, int64_t token, char* stage, hopper::Barrier& full) const {
    const int at = static_cast<int>(token), batch = static_cast<int>(task.sequence.batch);
    const uint32_t keys = kChannel ? 0 : 2 * KeyTile::kBytes;
    hopper::arrive_expect(full, prepared_bytes() + keys + static_cast<uint32_t>(params.groups * Square::kBytes));
    if constexpr (!kChannel) {
#pragma unroll
      for (int panel = 0; panel < KeyTile::kPanels; ++panel) {
        const int within = panel * KeyTile::kBytesPerPanel, column = panel * KeyTile::kPanelCols;
        const int head = static_cast<int>(task.key_head);
        hopper::load_tile(stage + At::kReads + within, params.k, full, column, head, at, batch);
        hopper::load_tile(stage + At::kQueries + within, params.q, full, column, head, at, batch);
      }
    }
    for (int group = 0; group < params.groups; ++group) {
      hopper::load_tile(stage + At::kValues + group * Square::kBytes, params.v, full,
                        task.column + group * kGroupColumns, static_cast<int>(task.head), at, batch);
    }
    load_prepared(index, stage, full);
  }

  TILEWRIGHT_DEVICE void load_part(int64_t index, int64_t token, int rows, char* stage, hopper::Barrier& full) const {
    const Problem<In, float>& p = params.problem;
    const int64_t batch = task.sequence.batch;
    if constexpr (!kChannel) {
      copy_rows<KeyTile>(p.k, batch, token, task.key_head, rows, 0, p.key_size, stage + At::kReads);
      copy_rows<KeyTile>(p.q, batch, token, task.key_head, rows, 0, p.key_size, stage + At::kQueries);
    }
    for (int group = 0; group < params.groups; ++group) {
      copy_rows<Square>(p.v, batch, token, task.head, rows, task.column + group * kGroupColumns, p.value_size,
                        stage + At::kValues + group * Square::kBytes);
    }
    hopper::fence_async_shared();
    hopper::named_sync(kProducerBarrier, 128);
    if (threadIdx.x % 128 == 0) {
      hopper::arrive_expect(full, prepared_bytes());
      load_prepared(index, stage, full);
    }
  }

  TILEWRIGHT_DEVICE void run(char* stages, hopper::Barrier* full, hopper::Barrier* empty) const {
    const int64_t chunks = chunks_of(task.sequence.tokens);
    Ring ring(params.stages);
    for (int64_t c = 0; c < chunks; ++c, ring.advance()) {
      hopper::wait(empty[ring.stage], ring.phase ^ 1);
      const int64_t index = (task.sequence.place + c) * params.problem.value_heads + task.head;
      const int64_t left = task.sequence.tokens - c * kChunk, token = task.sequence.first + c * kChunk;
      char* stage = stages + ring.stage * At::stage_bytes(params.groups);
      if (left < kChunk) {
        load_part(index, token, static_cast<int>(left), stage, full[ring.stage]);
      } else if (threadIdx.x % 128 == 0) {
        load_full(index, token, stage, full[ring.stage]);
      }
    }
  }
};

// ---- the warpgroups that compute

// An accumulator [64, 16 kSteps] as the register operand of the next product: both lie alike.
template <class In, int kSteps>
TILEWRIGHT_DEVICE void to_operand(const float (&from)[8 * kSteps], uint32_t (&to)[kSteps][4]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int w = 0; w < 4; ++w) to[s][w] = hopper::pack_pair<In>(from[8 * s + 2 * w], from[8 * s + 2 * w + 1]);
  }
}

// Factors of the two columns that word w of step s holds.
TILEWRIGHT_DEVICE void pair_of(const float* factors, int s, int w, float (&x)[2]) {
  const float* from = factors + 16 * s + 8 * (w / 2) + 2 * (static_cast<int>(threadIdx.x) % 4);
  x[0] = from[0];
  x[1] = from[1];
}

// The values' tile [tokens, columns] holds what a warp reads and later writes: its 16 columns, of no other warp.
template <class Tile>
TILEWRIGHT_DEVICE char* operand_row(char* tile, int s) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) % 128 / 32;
  return tile + Tile::offset(16 * s + lane / 16 * 8 + lane % 8, 16 * warp + lane / 8 % 2 * 8);
}

template <class In, int kKeys, bool kDelta, bool kChannel>
struct Consumer {
  using At = Layout<In, kKeys, kDelta, kChannel>;
  using KeyTile = typename At::KeyTile;
  using Square = typename At::Square;
  using ByTokens = Wgmma<In, In, kChunk>;
  using ByKeys = Wgmma<In, In, kKeys, hopper::Major::kK, hopper::Major::kMN>;
  static constexpr int kKeySteps = kKeys / 16, kTokenSteps = kChunk / 16;

  const StatesParams<In>& params;
  const Task& task;
  const int group;
  float state[kKeys / 2];

  TILEWRIGHT_DEVICE Consumer(const StatesParams<In>& p, const Task& t, int g) : params(p), task(t), group(g) {}

  TILEWRIGHT_DEVICE int first_column() const { return task.column + group * kGroupColumns; }

  // ---- the state in memory: [K, V]

  // Calls function(register, offset in the state) for what of it is inside.
  template <class Function>
  TILEWRIGHT_DEVICE void for_each_entry(const Function& function) {
    const Problem<In, float>& p = params.problem;
    const int thread = static_cast<int>(threadIdx.x);
    // Hidden from the compiler, so that offsets are not kept from the first use to the last.
    uint32_t size[2] = {static_cast<uint32_t>(p.key_size), static_cast<uint32_t>(p.value_size)};
    hopper::keep(size);
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const uint32_t column = static_cast<uint32_t>(first_column() + hopper::accumulator_row(thread, i));
      const uint32_t key = static_cast<uint32_t>(hopper::accumulator_col(thread, i));
      if (column < size[1] && key < size[0]) function(state[i], key * size[1] + column);
    }
  }

  TILEWRIGHT_DEVICE void load_state() {
    const Problem<In, float>& p = params.problem;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) state[i] = 0.0f;
    if (p.initial == nullptr) return;
    const float* from = p.initial + (task.n * p.value_heads + task.head) * p.state_size();
    for_each_entry([&](float& entry, uint32_t offset) { entry = from[offset]; });
  }

  TILEWRIGHT_DEVICE void store_state(float* to) {
    for_each_entry([&](float& entry, uint32_t offset) { to[offset] = entry; });
  }

  // ---- rows of results: through the values' tile, 32 bytes of a row a warp

  TILEWRIGHT_DEVICE void store_rows(const Rows<In>& rows, const uint32_t (&words)[kTokenSteps][4], int64_t token,
                                    int count, char* values) const {
    const Problem<In, float>& p = params.problem;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) % 128 / 32;
#pragma unroll
    for (int s = 0; s < kTokenSteps; ++s) hopper::stmatrix_x4_transposed(operand_row<Square>(values, s), words[s]);
    __syncwarp();
    const int within = 16 * warp + lane % 2 * 8;
#pragma unroll
    for (int i = 0; i < kTokenSteps; ++i) {
      const int row = 16 * i + lane / 2;
      if (row >= count || first_column() + within >= p.value_size) continue;
      hopper::store_16(rows.row(task.sequence.batch, token + row, task.head) + first_column() + within,
                       hopper::load_16(Square::at(values, row, within)));
    }
    __syncwarp();
  }

  // ---- one chunk

  TILEWRIGHT_DEVICE void multiply_state(const uint32_t (&s)[kKeySteps][4], const char* rows,
                                        float (&product)[32]) const {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      ByTokens::run(product, s[step], KeyTile::k_major(rows, 0, 16 * step), step > 0);
    }
    hopper::wgmma_commit();
  }

  TILEWRIGHT_DEVICE void multiply_tokens(const uint32_t (&w)[kTokenSteps][4], const char* square, float (&product)[32],
                                         bool accumulate) const {
#pragma unroll
    for (int step = 0; step < kTokenSteps; ++step) {
      ByTokens::run(product, w[step], Square::k_major(square, 0, 16 * step), accumulate || step > 0);
    }
    hopper::wgmma_commit();
  }

  // V - into X, from V.
  TILEWRIGHT_DEVICE void subtract_reads(const float (&x)[32], const float* into, uint32_t (&v)[kTokenSteps][4]) const {
#pragma unroll
    for (int s = 0; s < kTokenSteps; ++s) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float factor[2] = {1.0f, 1.0f}, low, high;
        if constexpr (!kChannel) pair_of(into, s, w, factor);
        hopper::unpack_pair<In>(v[s][w], low, high);
        v[s][w] = hopper::pack_pair<In>(fmaf(-factor[0], x[8 * s + 2 * w], low),
                                        fmaf(-factor[1], x[8 * s + 2 * w + 1], high));
      }
    }
  }

  TILEWRIGHT_DEVICE void decay_state(const float* factors) {
    if constexpr (kChannel) {
#pragma unroll
      for (int s = 0; s < kKeySteps; ++s) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float whole[2];
          pair_of(factors + 3 * kChunk, s, w, whole);
          state[8 * s + 2 * w] *= whole[0];
          state[8 * s + 2 * w + 1] *= whole[1];
        }
      }
    } else {
      // G stays what it was behind the last token, so the last entry is the whole chunk's decay.
      const float whole = factors[kChunk - 1];
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) state[i] *= whole;
    }
  }

  TILEWRIGHT_DEVICE void update_state(const uint32_t (&u)[kTokenSteps][4], const char* writes) {
#pragma unroll
    for (int step = 0; step < kTokenSteps; ++step) {
      ByKeys::run(state, u[step], KeyTile::mn_major(writes, 16 * step, 0), true);
    }
    hopper::wgmma_commit();
  }

  // Everything of the chunk that begins at a token; the stage holds its tiles.
  TILEWRIGHT_DEVICE void run_chunk(char* stage, int64_t token, int count) {
    const Problem<In, float>& p = params.problem;
    const auto* factors = reinterpret_cast<const float*>(stage + At::kFactors);
    char* values = stage + At::kValues + group * Square::kBytes;
    uint32_t s[kKeySteps][4], w[kTokenSteps][4], u[kTokenSteps][4];
    float x[32], o[32];
    to_operand<In, kKeySteps>(state, s);
    hopper::wgmma_fence();
    if constexpr (kDelta) multiply_state(s, stage + At::kReads, x);
    multiply_state(s, stage + At::kQueries, o);
#pragma unroll
    for (int step = 0; step < kTokenSteps; ++step) {
      hopper::ldmatrix_x4_transposed(w[step], operand_row<Square>(values, step));
    }
    if constexpr (kDelta) {
      hopper::wgmma_wait<1>();
      hopper::keep(x);
      subtract_reads(x, factors, w);
      hopper::wgmma_fence();
      multiply_tokens(w, stage + At::kInverse, x, false);
      hopper::wgmma_wait<0>();
      hopper::keep(x);
      to_operand<In, kTokenSteps>(x, w);
    } else {
      hopper::wgmma_wait<0>();
#pragma unroll
      for (int step = 0; step < kTokenSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          hopper::unpack_pair<In>(w[step][i], x[8 * step + 2 * i], x[8 * step + 2 * i + 1]);
        }
      }
    }
    hopper::keep(o);
#pragma unroll
    for (int step = 0; step < kTokenSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 8 * step + 2 * i;
        float write[2], query[2];
        pair_of(factors + 2 * kChunk, step, i, write);
        u[step][i] = hopper::pack_pair<In>(write[0] * x[at], write[1] * x[at + 1]);
        if constexpr (!kChannel) {
          pair_of(factors + kChunk, step, i, query);
          o[at] *= query[0];
          o[at + 1] *= query[1];
        }
      }
    }
    decay_state(factors);
    hopper::wgmma_fence();
    update_state(u, stage + At::kWrites);
    multiply_tokens(w, stage + At::kScores, o, true);
    hopper::wgmma_wait<0>();
    hopper::keep(state);
    hopper::keep(o);
    to_operand<In, kTokenSteps>(o, w);
    store_rows(p.out, w, token, count, values);
  }

  // Rows behind the last packed sequence.
  TILEWRIGHT_DEVICE void clear_rest() const {
    const Problem<In, float>& p = params.problem;
    if (p.sequences.offsets == nullptr || task.n != p.sequences.count - 1) return;
    const int thread = static_cast<int>(threadIdx.x) % 128, column = first_column() + thread % 8 * 8;
    if (column >= p.value_size) return;
    const int64_t end = task.sequence.first + task.sequence.tokens;
    for (int64_t t = end + thread / 8; t < p.sequences.tokens; t += 16) {
      hopper::store_16(p.out.row(0, t, task.head) + column, hopper::U128{0, 0, 0, 0});
    }
  }

  TILEWRIGHT_DEVICE void run(char* stages, hopper::Barrier* full, hopper::Barrier* empty) {
    const Problem<In, float>& p = params.problem;
    const int64_t chunks = chunks_of(task.sequence.tokens);
    load_state();
    Ring ring(params.stages);
    for (int64_t c = 0; c < chunks; ++c, ring.advance()) {
      const int64_t left = task.sequence.tokens - c * kChunk, token = task.sequence.first + c * kChunk;
      hopper::wait(full[ring.stage], ring.phase);
      run_chunk(stages + ring.stage * At::stage_bytes(params.groups), token,
                static_cast<int>(left < kChunk ? left : kChunk));
      // The values' tile was written to, and the copy engine is the next to write it.
      hopper::fence_async_shared();
      __syncwarp();
      if (threadIdx.x % 32 == 0) hopper::arrive(empty[ring.stage]);
    }
    store_state(p.state + (task.n * p.value_heads + task.head) * p.state_size());
    clear_rest();
  }
};

}  // namespace states

template <class In, int kKeys, bool kDelta, bool kChannel>
__global__ void __launch_bounds__(128 * (kMaxGroups + 1), 1)
    states_kernel(const __grid_constant__ StatesParams<In> params) {
  using namespace states;
  using At = Layout<In, kKeys, kDelta, kChannel>;
  const Task task = task_of(params);
  char* shared = hopper::shared_memory();
  auto* full = reinterpret_cast<hopper::Barrier*>(shared + params.stages * At::stage_bytes(params.groups));
  hopper::Barrier* empty = full + kMaxStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < params.stages; ++s) {
      hopper::init(full[s], 1);
      hopper::init(empty[s], 4 * params.groups);
    }
    hopper::fence_barrier_init();
  }
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x) / 128;
  if (group == params.groups) {
    hopper::lower_registers<kProducerRegisters>();
    Producer<In, kKeys, kDelta, kChannel>{params, task}.run(shared, full, empty);
  } else {
    hopper::raise_registers<kConsumerRegisters>();
    Consumer<In, kKeys, kDelta, kChannel>(params, task, group).run(shared, full, empty);
  }
}

}  // namespace tilewright::linear_attention::cuda
