// SPDX-License-Identifier: Apache-2.0
// Backward pass over keys in the tensor-core form. A block takes 128 keys of one key head, two warpgroups of 64; a third
// streams steps of 32 queries: q, x, -u, do as tiles and the rows' records. Products are transposed, keys by queries, so that
// their results are the left operands of what adds up:
//
//   dk_j = sum_i scale ds_ij q_i - p_ij e_ij x_i - p_ij a_ij u_i        dv_j = sum_i p_ij a_ij do_i
//
// Query heads of a group and queries follow one another in one order: the sums are the same bits each time. Queries that
// not all keys of the block are seen by are cleaned as keys are in flash.cuh.
#pragma once

#include "ops/local_linear_attention/cuda/flash_backward_queries.cuh"

namespace tilewright::local_linear_attention::cuda {

template <class T>
struct FlashKeysParams {
  hopper::TensorMap k, v, q, x, u, grad;
  Shape shape;
  Options options;
  Sequences sequences;
  const FlashGradRecord* records;
  T *dk, *dv;
};

template <class T, int D>
struct KeysShape {
  static constexpr int kRows = 32;  // queries of a step
  static constexpr int kStages = D == 64 ? 6 : 4;
  static constexpr auto kSwizzle = hopper::Swizzle::k128;
  using KeyTile = hopper::Tile<T, kGroupRows, D, kSwizzle>;
  using StepTile = hopper::Tile<T, kRows, D, kSwizzle>;
  static constexpr int kPanelCols = StepTile::kPanelCols;
  static constexpr int kTiles = 4;  // q, x, -u, do
  static constexpr int kStageBytes = kTiles * StepTile::kBytes + kRows * static_cast<int>(sizeof(FlashGradRecord));
  static_assert(kStageBytes % 1024 == 0);

  static constexpr int kKeys = 0;
  static constexpr int kValues = kKeys + kGroups * KeyTile::kBytes;
  static constexpr int kRing = kValues + kGroups * KeyTile::kBytes;
  static constexpr int kMarks = kRing + kStages * kStageBytes;  // [kBlockRows] int: keys that a spoilt row sees
  static constexpr int kSpoilt = kMarks + kBlockRows * 4;  // [2][kRows] int: rows of a step, by turns
  static constexpr int kPlace = kSpoilt + 2 * kRows * 4;  // [2] int64
  static constexpr int kBarriers = kPlace + 16;
  static constexpr int kBytes = kBarriers + (2 * kStages + 1) * 8;
  static_assert(kBytes <= hopper::kMaxSharedBytes);
};

// 128 keys of one sequence and the steps of queries that see any of them.
struct KeyBlock {
  Segment segment;
  int first, keys;  // within the segment
  int common_begin, common_end;  // queries that see all keys
  int first_step, last_step;
};

template <int Rows>
TILEWRIGHT_DEVICE KeyBlock key_block(const Options& o, const Segment& s, int64_t block) {
  KeyBlock b{s, static_cast<int>(block * kBlockRows), 0, 0, 0, 0, 0};
  const int64_t rest = s.keys - block * kBlockRows;
  if (rest <= 0) return b;
  b.keys = static_cast<int>(rest < kBlockRows ? rest : kBlockRows);
  const Range first = seeing_queries(o, s, b.first), last = seeing_queries(o, s, b.first + b.keys - 1);
  b.common_begin = static_cast<int>(last.begin);
  b.common_end = static_cast<int>(first.end > 0 ? first.end : 0);
  const int64_t end = last.end;
  if (end <= first.begin) return b;
  b.first_step = static_cast<int>(first.begin / Rows);
  b.last_step = static_cast<int>((end + Rows - 1) / Rows);
  return b;
}

template <class T, int D>
struct KeysConsumer {
  using S = KeysShape<T, D>;
  char* memory;
  const Options* options;
  KeyBlock block;
  hopper::Barrier *full, *empty;
  hopper::PipelineState<S::kStages> at;
  int thread, group;
  int begin[2], end[2];  // queries that see the thread's two keys
  int turn;  // of the flags of spoilt rows

  TILEWRIGHT_DEVICE int key(int h) const { return group * kGroupRows + hopper::accumulator_row(thread, 2 * h); }
  TILEWRIGHT_DEVICE int col(int i) const { return hopper::accumulator_col(thread, i); }
  TILEWRIGHT_DEVICE bool valid(int h) const { return key(h) < block.keys; }
  TILEWRIGHT_DEVICE char* stage() const { return memory + S::kRing + at.stage * S::kStageBytes; }
  TILEWRIGHT_DEVICE const char* left(int from) const { return memory + from + group * S::KeyTile::kBytes; }
  TILEWRIGHT_DEVICE FlashGradRecord* records() const {
    return reinterpret_cast<FlashGradRecord*>(stage() + S::kTiles * S::StepTile::kBytes);
  }
  TILEWRIGHT_DEVICE bool whole(int step) const {
    return block.common_begin <= step * S::kRows && (step + 1) * S::kRows <= block.common_end;
  }
};

template <class T, int D>
TILEWRIGHT_DEVICE KeysConsumer<T, D> make_keys_consumer(char* memory, const Options& options, const KeyBlock& block) {
  using S = KeysShape<T, D>;
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriers);
  KeysConsumer<T, D> c{memory, &options, block, barriers, barriers + S::kStages, {}};
  c.thread = static_cast<int>(threadIdx.x) % 128;
  c.group = static_cast<int>(threadIdx.x) / 128 - 1;
  c.turn = 0;
  for (int h = 0; h < 2; ++h) {
    const int key = c.valid(h) ? c.key(h) : block.keys - 1;
    const Range seeing = seeing_queries(options, block.segment, block.first + key);
    c.begin[h] = static_cast<int>(seeing.begin);
    c.end[h] = static_cast<int>(seeing.end);
  }
  return c;
}

// Whether a part of a row of one of the step's tiles is not finite.
template <class T, int D>
TILEWRIGHT_DEVICE bool part_is_spoilt(const char* tile, int row, int part) {
  using S = KeysShape<T, D>;
  bool bad = false;
  for (int col = part * (D / 2); col < (part + 1) * (D / 2); col += 8) {
    const hopper::U128 words = hopper::load_16(S::StepTile::at(tile, row, col));
    bad = bad || has_infinity<T>(words.x) || has_infinity<T>(words.y) || has_infinity<T>(words.z) ||
          has_infinity<T>(words.w);
  }
  return bad;
}

TILEWRIGHT_DEVICE bool record_is_spoilt(const FlashGradRecord& record) {
  const float sum = record.peak + record.inverse + record.value + record.mean + record.key_x + record.key_u;
  return sum - sum != 0.0f;
}

// By all consumers: two threads for each row of each of the four tiles.
template <class T, int D>
TILEWRIGHT_DEVICE void clean_rows(KeysConsumer<T, D>& c, int step) {
  using S = KeysShape<T, D>;
  static_assert(S::kTiles * S::kRows * 2 == kConsumers);
  const int thread = c.group * 128 + c.thread, row = thread / 2 % S::kRows, part = thread % 2;
  char* tile = c.stage() + thread / 2 / S::kRows * S::StepTile::kBytes;
  int* spoilt = reinterpret_cast<int*>(c.memory + S::kSpoilt) + c.turn * S::kRows;
  int* others = reinterpret_cast<int*>(c.memory + S::kSpoilt) + (1 - c.turn) * S::kRows;
  const int query = step * S::kRows + row;
  const bool outside = query >= c.block.segment.queries;
  // Behind the last row of the tensor there is no record either.
  if (outside || record_is_spoilt(c.records()[row]) || part_is_spoilt<T, D>(tile, row, part))
    atomicAdd(spoilt + row, 1);
  meet(kCleanBarrier, kConsumers);
  if (thread < S::kRows) others[thread] = 0;
  if (spoilt[row] != 0) {
    for (int col = part * (D / 2); col < (part + 1) * (D / 2); col += 8) {
      hopper::store_16(S::StepTile::at(tile, row, col), hopper::U128{0, 0, 0, 0});
    }
    if (thread / 2 < S::kRows && part == 0) {
      c.records()[row] = FlashGradRecord{};
      for (int key = 0; key < c.block.keys && !outside; ++key) {
        const Range seeing = seeing_queries(*c.options, c.block.segment, c.block.first + key);
        if (seeing.begin <= query && query < seeing.end)
          atomicAdd(reinterpret_cast<int*>(c.memory + S::kMarks) + key, 1);
      }
    }
  }
  hopper::fence_async_shared();
  meet(kCleanBarrier, kConsumers);
  c.turn = 1 - c.turn;
}

// to[64 keys, 32 queries] = keys or values x tile of the step, transposed.
template <class T, int D>
TILEWRIGHT_DEVICE void project_step(const KeysConsumer<T, D>& c, int left, const char* tile,
                                    float (&to)[KeysShape<T, D>::kRows / 2], bool add = false) {
  using S = KeysShape<T, D>;
  using Product = hopper::Wgmma<T, T, S::kRows>;
#pragma unroll
  for (int k = 0; k < D; k += Product::kDepth) {
    Product::run(to, S::KeyTile::k_major(c.left(left), 0, k), S::StepTile::k_major(tile, 0, k), add || k > 0);
  }
}

template <class T, int D>
TILEWRIGHT_DEVICE void collect_step(const uint32_t (&factors)[2][4], const char* tile, float (&sums)[D / 2]) {
  using S = KeysShape<T, D>;
  using Product = hopper::Wgmma<T, T, D, hopper::Major::kK, hopper::Major::kMN>;
#pragma unroll
  for (int step = 0; step < S::kRows / 16; ++step) {
    Product::run(sums, factors[step], S::StepTile::mn_major(tile, step * 16, 0), true);
  }
}

template <class T, int Count>
TILEWRIGHT_DEVICE void pack_plain(const float (&values)[Count], uint32_t (&factors)[Count / 8][4]) {
#pragma unroll
  for (int i = 0; i < Count; i += 2) factors[i / 8][i / 2 % 4] = hopper::pack_pair<T>(values[i], values[i + 1]);
}

// One step of queries.
template <class T, int D>
TILEWRIGHT_DEVICE void add_step(KeysConsumer<T, D>& c, int step, float (&dk)[D / 2], float (&dv)[D / 2]) {
  using S = KeysShape<T, D>;
  constexpr int kCount = S::kRows / 2;
  const char *q = c.stage(), *x = q + S::StepTile::kBytes, *u = x + S::StepTile::kBytes,
             *grad = u + S::StepTile::kBytes;
  const float natural = static_cast<float>(c.options->scale), scale = natural * kLog2E;
  float s[kCount], along_x[kCount], gamma[kCount];
  uint32_t by_q[2][4], by_x[2][4], by_grad[2][4];
  hopper::wgmma_fence();
  project_step<T, D>(c, S::kKeys, q, s);
  project_step<T, D>(c, S::kKeys, x, along_x);
  project_step<T, D>(c, S::kValues, grad, gamma);
  project_step<T, D>(c, S::kKeys, u, gamma, true);  // gamma - u.k
  hopper::wgmma_commit();
  hopper::wgmma_wait<0>();
  hopper::keep(s);
  hopper::keep(along_x);
  hopper::keep(gamma);
  const bool whole = c.whole(step);
#pragma unroll
  for (int pair = 0; pair < kCount / 2; ++pair) {
    const int column = pair / 2 * 4 + pair % 2;  // register of the first of the thread's two keys
    const FlashGradRecord& record = c.records()[c.col(column)];
    const float peak = record.peak, inverse = record.inverse, mean = record.mean;
    const float level = 1.0f + record.key_x, off = record.value - record.key_u;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = column + 2 * h, query = step * S::kRows + c.col(i);
      float weight = hopper::exp2_flushed(fmaf(s[i], scale, -peak)) * inverse;
      if (!whole) weight = c.begin[h] <= query && query < c.end[h] ? weight : 0.0f;
      const float a = weight * (level - along_x[i]), e = gamma[i] - off;
      s[i] = natural * (e * a - weight * mean);
      along_x[i] = -weight * e;
      gamma[i] = a;
    }
  }
  pack_plain<T>(s, by_q);
  pack_plain<T>(along_x, by_x);
  pack_plain<T>(gamma, by_grad);
  hopper::wgmma_fence();
  collect_step<T, D>(by_q, q, dk);
  collect_step<T, D>(by_x, x, dk);
  collect_step<T, D>(by_grad, u, dk);
  collect_step<T, D>(by_grad, grad, dv);
  hopper::wgmma_commit();
  hopper::wgmma_wait<0>();
  hopper::keep(dk);
  hopper::keep(dv);
}

template <class T, int D>
TILEWRIGHT_DEVICE void write_keys(const KeysConsumer<T, D>& c, const FlashKeysParams<T>& p, const float (&dk)[D / 2],
                                  const float (&dv)[D / 2]) {
  const int* marks = reinterpret_cast<const int*>(c.memory + KeysShape<T, D>::kMarks);
  for (int h = 0; h < 2; ++h) {
    if (!c.valid(h)) continue;
    const float mark = marks[c.key(h)] == 0 ? 0.0f : hopper::bits_float(0x7fc00000u);
    const int64_t at = (c.block.segment.first_key + c.block.first + c.key(h)) * p.shape.kv_heads + blockIdx.y;
#pragma unroll
    for (int i = 0; i < D / 2; i += 4) {
      const int own = i + 2 * h, col = c.col(own);
      if (col < p.shape.key_size) {
        *reinterpret_cast<uint32_t*>(p.dk + at * p.shape.key_size + col) =
            hopper::pack_pair<T>(dk[own] + mark, dk[own + 1] + mark);
      }
      if (col < p.shape.value_size) {
        *reinterpret_cast<uint32_t*>(p.dv + at * p.shape.value_size + col) =
            hopper::pack_pair<T>(dv[own] + mark, dv[own + 1] + mark);
      }
    }
  }
}

template <class T, int D>
TILEWRIGHT_DEVICE void keys_consumer(const FlashKeysParams<T>& p, char* memory, const KeyBlock& block) {
  using S = KeysShape<T, D>;
  KeysConsumer<T, D> c = make_keys_consumer<T, D>(memory, p.options, block);
  float dk[D / 2], dv[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.0f;
  hopper::wait(c.full[2 * S::kStages], 0);
  const int group = static_cast<int>(p.shape.heads / p.shape.kv_heads);
  for (int head = 0; head < group; ++head) {
    for (int step = block.first_step; step < block.last_step; ++step) {
      hopper::wait(c.full[c.at.stage], c.at.phase);
      if (!c.whole(step)) clean_rows(c, step);
      add_step(c, step, dk, dv);
      __syncwarp();
      if (c.thread % 32 == 0) hopper::arrive(c.empty[c.at.stage]);
      c.at.advance();
    }
  }
  meet(kCleanBarrier, kConsumers);  // the last marks
  write_keys(c, p, dk, dv);
}

template <class T, int D>
TILEWRIGHT_DEVICE void send_step(const FlashKeysParams<T>& p, char* stage, hopper::Barrier& full, int head,
                                 int64_t row) {
  using S = KeysShape<T, D>;
  const int64_t left = p.sequences.rows - row;  // records end with the tensor
  const auto rows = static_cast<uint32_t>(left < S::kRows ? left : S::kRows);
  const auto bytes = rows * static_cast<uint32_t>(sizeof(FlashGradRecord));
  hopper::arrive_expect(full, S::kTiles * S::StepTile::kBytes + bytes);
  const hopper::TensorMap* maps[S::kTiles] = {&p.q, &p.x, &p.u, &p.grad};
  for (int tile = 0; tile < S::kTiles; ++tile) {
    for (int panel = 0; panel < S::StepTile::kPanels; ++panel) {
      hopper::load_tile(stage + tile * S::StepTile::kBytes + panel * S::StepTile::kBytesPerPanel, *maps[tile], full,
                        panel * S::kPanelCols, head, static_cast<int>(row));
    }
  }
  hopper::load_bulk(stage + S::kTiles * S::StepTile::kBytes, p.records + head * p.sequences.rows + row, bytes, full);
}

// By one thread.
template <class T, int D>
TILEWRIGHT_DEVICE void keys_producer(const FlashKeysParams<T>& p, char* memory, const KeyBlock& block) {
  using S = KeysShape<T, D>;
  auto* full = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriers);
  hopper::Barrier* empty = full + S::kStages;
  hopper::Barrier& keys_full = full[2 * S::kStages];
  const int kv_head = static_cast<int>(blockIdx.y), group = static_cast<int>(p.shape.heads / p.shape.kv_heads);
  hopper::arrive_expect(keys_full, 2 * kGroups * S::KeyTile::kBytes);
  for (int part = 0; part < kGroups; ++part) {
    for (int panel = 0; panel < S::KeyTile::kPanels; ++panel) {
      const int to = part * S::KeyTile::kBytes + panel * S::KeyTile::kBytesPerPanel;
      const int row = static_cast<int>(block.segment.first_key) + block.first + part * kGroupRows;
      hopper::load_tile(memory + S::kKeys + to, p.k, keys_full, panel * S::kPanelCols, kv_head, row);
      hopper::load_tile(memory + S::kValues + to, p.v, keys_full, panel * S::kPanelCols, kv_head, row);
    }
  }
  hopper::PipelineState<S::kStages> at;
  for (int head = 0; head < group; ++head) {
    for (int step = block.first_step; step < block.last_step; ++step) {
      hopper::wait(empty[at.stage], at.phase ^ 1);
      send_step<T, D>(p, memory + S::kRing + at.stage * S::kStageBytes, full[at.stage], kv_head * group + head,
                      block.segment.first_query + static_cast<int64_t>(step) * S::kRows);
      at.advance();
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kFlashThreads, 1) flash_backward_keys(const __grid_constant__ FlashKeysParams<T> p) {
  using S = KeysShape<T, D>;
  char* memory = hopper::shared_memory();
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriers);
  auto* place = reinterpret_cast<int64_t*>(memory + S::kPlace);
  for (int i = static_cast<int>(threadIdx.x); i < kBlockRows + 2 * S::kRows; i += kFlashThreads) {
    reinterpret_cast<int*>(memory + S::kMarks)[i] = 0;  // and the flags behind them
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      hopper::init(barriers[stage], 1);
      hopper::init(barriers[S::kStages + stage], kConsumers / 32);
    }
    hopper::init(barriers[2 * S::kStages], 1);
    hopper::fence_barrier_init();
  }
  find_block<true>(p.sequences, blockIdx.x, place);
  if (place[0] < 0) return;
  const KeyBlock block = key_block<S::kRows>(p.options, segment(p.sequences, place[0]), place[1]);
  if (block.keys == 0) return;
  if (threadIdx.x < 128) {
    hopper::lower_registers<kProducerRegisters>();
    if (threadIdx.x == 0) keys_producer<T, D>(p, memory, block);
  } else {
    hopper::raise_registers<kConsumerRegisters>();
    keys_consumer<T, D>(p, memory, block);
  }
}

}  // namespace tilewright::local_linear_attention::cuda
