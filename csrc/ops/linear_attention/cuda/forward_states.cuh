// SPDX-License-Identifier: Apache-2.0
// States through the chunks: one block for each sequence, value head and 64 or 128 columns of the state, through all
// chunks in order. Everything is transposed, so that a warpgroup keeps the whole recurrence in its registers: the state
// S^T [64 columns of V, K] is an accumulator, its rounded copy the register operand of the next products, and what they
// give is the register operand of the ones after. Only right operands come through shared memory.
//
//   X^T = S^T (reads)^T                    what the state holds under the keys      delta rule
//   W^T = (V - into X)^T (inverse)^T       what each token corrects                 additive rule: W = V
//   O^T = query (S^T (queries)^T) + W^T (scores)^T
//   S^T = whole S^T + (write W)^T (writes)
//
//   scores_ij = scale q_i . k_j exp(G_i - G_j) beta_j      into_i = exp(G_i), query = scale into, whole = into of the last
//   write_i = beta_i exp(G_n - G_i)                        G: running sums of g in the chunk
//
// One warpgroup more helps: it has the copy engine bring tiles into a ring of stages, makes scores and factors one chunk
// ahead, and is told by barriers when a stage may be overwritten. A sequence's last chunk, when it is not full, comes by
// ordinary loads: rows of the next sequence must not be seen, as 0 times NaN is NaN. With a decay a channel scores, keys
// and queries come prepared, into and query are 1, and whole is one factor a channel.
#pragma once

#include "ops/linear_attention/cuda/forward_helper.cuh"
#include "ops/linear_attention/cuda/unit_lower.cuh"

namespace tilewright::linear_attention::cuda {
namespace states {

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
  using ByKeys = Wgmma<In, In, At::kOwnKeys, hopper::Major::kK, hopper::Major::kMN>;
  static constexpr int kKeySteps = At::kOwnKeys / 16, kTokenSteps = kChunk / 16;

  const StatesParams<In>& params;
  const Task& task;
  char* stages;
  Barriers& barriers;
  const int group;  // of columns
  const int half;  // of keys
  float state[At::kOwnKeys / 2];

  TILEWRIGHT_DEVICE Consumer(const StatesParams<In>& p, const Task& t, char* s, Barriers& b, int g)
      : params(p), task(t), stages(s), barriers(b), group(At::kSplit ? 0 : g), half(At::kSplit ? g : 0) {}

  TILEWRIGHT_DEVICE char* stage_at(int stage) const { return stages + stage * At::stage_bytes(params.groups); }
  TILEWRIGHT_DEVICE char* values_of(char* stage) const { return stage + At::kValues + group * Square::kBytes; }

  TILEWRIGHT_DEVICE int first_column() const { return task.column + group * kGroupColumns; }
  // Panels of a tile lie one after the other.
  TILEWRIGHT_DEVICE const char* own_keys(const char* tile) const {
    return At::kSplit ? tile + half * (KeyTile::kBytes / 2) : tile;
  }
  TILEWRIGHT_DEVICE int first_key() const { return At::kSplit ? half * At::kOwnKeys : 0; }

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
    for (int i = 0; i < At::kOwnKeys / 2; ++i) {
      const uint32_t column = static_cast<uint32_t>(first_column() + hopper::accumulator_row(thread, i));
      const uint32_t key = static_cast<uint32_t>(first_key() + hopper::accumulator_col(thread, i));
      if (column < size[1] && key < size[0]) function(state[i], key * size[1] + column);
    }
  }

  TILEWRIGHT_DEVICE void load_state() {
    const Problem<In, float>& p = params.problem;
#pragma unroll
    for (int i = 0; i < At::kOwnKeys / 2; ++i) state[i] = 0.0f;
    if (p.initial == nullptr) return;
    const float* from = p.initial + (static_cast<int64_t>(task.n) * p.value_heads + task.head) * p.state_size();
    for_each_entry([&](float& entry, uint32_t offset) { entry = from[offset]; });
  }

  TILEWRIGHT_DEVICE void store_state(float* to) {
    for_each_entry([&](float& entry, uint32_t offset) { to[offset] = entry; });
  }

  // ---- rows of results: through the values' tile, 32 bytes of a row a warp

  TILEWRIGHT_DEVICE void store_rows(const Rows<In>& rows, const uint32_t (&words)[kTokenSteps][4], int token, int count,
                                    char* values) const {
    const Problem<In, float>& p = params.problem;
#pragma unroll
    for (int s = 0; s < kTokenSteps; ++s) hopper::stmatrix_x4_transposed(operand_row<Square>(values, s), words[s]);
    __syncwarp();
    // Hidden from the compiler: addresses are made anew rather than kept from chunk to chunk.
    uint32_t hidden[1] = {threadIdx.x % 128};
    hopper::keep(hidden);
    const int lane = static_cast<int>(hidden[0]) % 32, within = static_cast<int>(hidden[0]) / 32 * 16 + lane % 2 * 8;
    const int column = first_column() + within;
#pragma unroll
    for (int i = 0; i < kTokenSteps; ++i) {
      const int row = 16 * i + lane / 2;
      if (row >= count || column >= p.value_size) continue;
      hopper::store_16(rows.row(task.batch, token + row, task.head) + column,
                       hopper::load_16(Square::at(values, row, within)));
    }
    __syncwarp();
  }

  // ---- sums over keys that two warpgroups have half of each

  // Of one half; both have the same threads' numbers in the same places.
  TILEWRIGHT_DEVICE float* exchange(int of) const {
    uint32_t hidden[1] = {threadIdx.x % 128};
    hopper::keep(hidden);
    auto* from = reinterpret_cast<float*>(stages + params.stages * At::stage_bytes(params.groups));
    return from + of * kChunk * kGroupColumns + static_cast<int>(hidden[0]) * 4;
  }

  TILEWRIGHT_DEVICE void tell(const float (&x)[32]) const {
    float* to = exchange(half);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const FourFloats four{{x[i], x[i + 1], x[i + 2], x[i + 3]}};
      *reinterpret_cast<FourFloats*>(to + i * 128) = four;
    }
  }

  TILEWRIGHT_DEVICE void add_told(float (&x)[32]) const {
    const float* from = exchange(1 - half);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const FourFloats four = *reinterpret_cast<const FourFloats*>(from + i * 128);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i + e] += four.x[e];
    }
  }

  // X over all keys, in both halves. What the second half tells lies where its outputs of the chunk before lay.
  TILEWRIGHT_DEVICE void share_reads(float (&x)[32], bool first) const {
    if (half == 1 && !first) hopper::named_sync(kOutputsRead, 256);
    tell(x);
    hopper::named_sync(kReadsWritten, 256);
    add_told(x);
    if (half == 0) hopper::named_arrive(kReadsRead, 256);
  }

  // O over all keys, in the first half. The additive rule has told nothing before.
  TILEWRIGHT_DEVICE void share_outputs(float (&o)[32], bool first, bool last) const {
    if (half == 1) {
      if constexpr (kDelta) hopper::named_sync(kReadsRead, 256);
      if (!kDelta && !first) hopper::named_sync(kOutputsRead, 256);
      tell(o);
      hopper::named_arrive(kOutputsWritten, 256);
    } else {
      hopper::named_sync(kOutputsWritten, 256);
      add_told(o);
      if (!last) hopper::named_arrive(kOutputsRead, 256);
    }
  }

  // ---- one chunk

  TILEWRIGHT_DEVICE void multiply_state(const uint32_t (&s)[kKeySteps][4], const char* rows,
                                        float (&product)[32]) const {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      ByTokens::run(product, s[step], KeyTile::k_major(own_keys(rows), 0, 16 * step), step > 0);
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

  TILEWRIGHT_DEVICE void decay_state(const char* factors) {
    if constexpr (kChannel) {
      const float* whole = reinterpret_cast<const float*>(factors) + kChunk;
#pragma unroll
      for (int s = 0; s < kKeySteps; ++s) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float factor[2];
          pair_of(whole, s, w, factor);
          state[8 * s + 2 * w] *= factor[0];
          state[8 * s + 2 * w + 1] *= factor[1];
        }
      }
    } else {
      // G stays what it was behind the last token, so the last entry is the whole chunk's decay.
      const float whole = reinterpret_cast<const Factors*>(factors)->into[kChunk - 1];
#pragma unroll
      for (int i = 0; i < At::kOwnKeys / 2; ++i) state[i] *= whole;
    }
  }

  TILEWRIGHT_DEVICE void update_state(const uint32_t (&u)[kTokenSteps][4], const char* writes) {
#pragma unroll
    for (int step = 0; step < kTokenSteps; ++step) {
      ByKeys::run(state, u[step], KeyTile::mn_major(own_keys(writes), 16 * step, 0), true);
    }
    hopper::wgmma_commit();
  }

  TILEWRIGHT_DEVICE void load_values(char* values, uint32_t (&v)[kTokenSteps][4]) const {
#pragma unroll
    for (int s = 0; s < kTokenSteps; ++s) hopper::ldmatrix_x4_transposed(v[s], operand_row<Square>(values, s));
  }

  TILEWRIGHT_DEVICE void scale_columns(float (&x)[32], const float* factors) const {
#pragma unroll
    for (int s = 0; s < kTokenSteps; ++s) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float factor[2];
        pair_of(factors, s, w, factor);
        x[8 * s + 2 * w] *= factor[0];
        x[8 * s + 2 * w + 1] *= factor[1];
      }
    }
  }

  // Once the products with the state before the chunk are done: what they and the state are multiplied by.
  TILEWRIGHT_DEVICE void decay(float (&o)[32], const char* factors) {
    hopper::keep(o);
    if constexpr (!kChannel) scale_columns(o, reinterpret_cast<const Factors*>(factors)->query);
    decay_state(factors);
  }

  // W, rounded into w and in x: from V in w and, for the delta rule, the product X under way in x. On the way o, the
  // product with the queries, is finished and decayed.
  TILEWRIGHT_DEVICE void correct(const char* stage, bool first, uint32_t (&w)[kTokenSteps][4], float (&x)[32],
                                 float (&o)[32]) {
    const char* factors = stage + At::kFactors;
    if constexpr (kDelta) {
      hopper::wgmma_wait<1>();
      hopper::keep(x);
      if constexpr (At::kSplit) share_reads(x, first);
      subtract_reads(x, kChannel ? nullptr : reinterpret_cast<const Factors*>(factors)->into, w);
      hopper::wgmma_fence();
      multiply_tokens(w, stage + At::kInverse, x, false);
      hopper::wgmma_wait<1>();
      decay(o, factors);
      hopper::wgmma_wait<0>();
      hopper::keep(x);
      to_operand<In, kTokenSteps>(x, w);
    } else {
#pragma unroll
      for (int s = 0; s < kTokenSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) hopper::unpack_pair<In>(w[s][i], x[8 * s + 2 * i], x[8 * s + 2 * i + 1]);
      }
      hopper::wgmma_wait<0>();
      decay(o, factors);
    }
  }

  // The results of a chunk whose products are done, and its stage back to the helper.
  TILEWRIGHT_DEVICE void finish(int chunk, int stage, const uint32_t (&results)[kTokenSteps][4]) const {
    if (half == 0) {
      store_rows(params.problem.out, results, task.token(chunk), task.rows(chunk), values_of(stage_at(stage)));
    }
    // The values' tile was written to, and the copy engine is the next to write it.
    hopper::fence_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) hopper::arrive(barriers.empty[stage]);
  }

  TILEWRIGHT_DEVICE void run_chunks() {
    const int chunks = task.chunks();
    uint32_t s[kKeySteps][4], results[kTokenSteps][4];
    to_operand<In, kKeySteps>(state, s);
    Ring ring(params.stages);
    int before = 0;
    for (int c = 0; c < chunks; ++c) {
      char* stage = stage_at(ring.stage);
      float x[32], o[32];
      hopper::wait(barriers.full[ring.stage], ring.phase);
      hopper::wgmma_fence();
      if constexpr (kDelta) multiply_state(s, stage + At::kReads, x);
      multiply_state(s, stage + At::kQueries, o);
      // While these products run, the chunk before is stored; with half of the keys each, registers are too few.
      if (!At::kSplit && c > 0) finish(c - 1, before, results);
      if constexpr (!kChannel) hopper::wait(barriers.ready[ring.stage], ring.phase);
      uint32_t w[kTokenSteps][4], u[kTokenSteps][4];
      load_values(values_of(stage), w);
      correct(stage, c == 0, w, x, o);
      scale_columns(x, reinterpret_cast<const float*>(stage + At::kFactors));
      to_operand<In, kTokenSteps>(x, u);
      if constexpr (At::kSplit) {
        // Once is enough: the second half adds zeros. A product in one branch only would hold up all others.
#pragma unroll
        for (int i = 0; i < 4 * kTokenSteps; ++i) w[i / 4][i % 4] = half == 0 ? w[i / 4][i % 4] : 0;
      }
      hopper::wgmma_fence();
      update_state(u, stage + At::kWrites);
      multiply_tokens(w, stage + At::kScores, o, true);
      hopper::wgmma_wait<1>();
      hopper::keep(state);
      to_operand<In, kKeySteps>(state, s);
      hopper::wgmma_wait<0>();
      hopper::keep(o);
      if constexpr (At::kSplit) share_outputs(o, c == 0, c == chunks - 1);
      to_operand<In, kTokenSteps>(o, results);
      if constexpr (At::kSplit) finish(c, ring.stage, results);
      before = ring.stage;
      ring.advance();
    }
    if (!At::kSplit && chunks > 0) finish(chunks - 1, before, results);
  }

  // Rows behind the last packed sequence.
  TILEWRIGHT_DEVICE void clear_rest() const {
    const Problem<In, float>& p = params.problem;
    if (p.sequences.offsets == nullptr || task.n != p.sequences.count - 1) return;
    const int thread = static_cast<int>(threadIdx.x) % 128, column = first_column() + thread % 8 * 8;
    if (column >= p.value_size) return;
    const int64_t end = task.first + task.tokens;
    for (int64_t t = end + thread / 8; t < p.sequences.tokens; t += 16) {
      hopper::store_16(p.out.row(0, t, task.head) + column, hopper::U128{0, 0, 0, 0});
    }
  }

  TILEWRIGHT_DEVICE void run() {
    const Problem<In, float>& p = params.problem;
    load_state();
    run_chunks();
    store_state(p.state + (static_cast<int64_t>(task.n) * p.value_heads + task.head) * p.state_size());
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
  auto& barriers =
      *reinterpret_cast<Barriers*>(shared + params.stages * At::stage_bytes(params.groups) + At::kExchange);
  if (threadIdx.x == 0) {
    for (int s = 0; s < params.stages; ++s) {
      hopper::init(barriers.full[s], 1);
      hopper::init(barriers.ready[s], 128);
      hopper::init(barriers.empty[s], 4 * At::consumers(params.groups));
    }
    hopper::fence_barrier_init();
  }
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x) / 128;
  if (group == At::consumers(params.groups)) {
    hopper::lower_registers<helper_registers(kChannel)>();
    Helper<In, kKeys, kDelta, kChannel>{params, task, shared, barriers}.run();
  } else {
    hopper::raise_registers<consumer_registers(kChannel)>();
    Consumer<In, kKeys, kDelta, kChannel>(params, task, shared, barriers, group).run();
  }
}

}  // namespace tilewright::linear_attention::cuda
