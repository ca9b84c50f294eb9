// SPDX-License-Identifier: Apache-2.0
// Forward pass in the tensor-core form: statistics, conjugate gradients, output. The notation is that of README.md.
#pragma once

#include "ops/local_linear_attention/cuda/flash_solve.cuh"

namespace tilewright::local_linear_attention::cuda {

template <class T>
struct FlashForwardParams {
  hopper::TensorMap q, k, v;
  Shape shape;
  Options options;
  Sequences sequences;
  const float* ridge;  // as in Forward
  const float* given;  // x of Parallax
  T* o;
  float *x, *rows;
  int32_t* iterations;
};

// peak, omega and kbar by running maxima; leaves kbar in y.
template <class T, int D>
TILEWRIGHT_DEVICE void gather_statistics(Consumer<T, D>& c, RowNumbers& n, float (&y)[D / 2]) {
  using S = FlashShape<T, D>;
  constexpr int kCount = S::kKeys / 2;
  float s[kCount], omega[2], rounded[2] = {0.0f, 0.0f};
  uint32_t factors[S::kKeys / 16][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) y[i] = 0.0f;
  for (int h = 0; h < 2; ++h) {
    n.peak[h] = hopper::bits_float(0xff800000u);
    omega[h] = 0.0f;
  }
  const auto digest = [&](int tile) {
    hopper::keep(s);
    hopper::keep(y);
    float most[2] = {n.peak[0], n.peak[1]}, base[2], shrink[2];
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] *= n.scale;
    if (!c.whole(tile)) {
      const Seen seen = c.seen();
#pragma unroll
      for (int i = 0; i < kCount; ++i) s[i] = c.sees(seen, i, tile) ? s[i] : hopper::bits_float(0xff800000u);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      most[h] = quad_max(most[h]);
      base[h] = most[h] == hopper::bits_float(0xff800000u) ? 0.0f : most[h];
      shrink[h] = hopper::exp2_flushed(n.peak[h] - base[h]);
      n.peak[h] = most[h];
      omega[h] *= shrink[h];
      rounded[h] *= shrink[h];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      s[i] = hopper::exp2_flushed(s[i] - base[i / 2 % 2]);
      omega[i / 2 % 2] += s[i];
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) y[i] *= shrink[i / 2 % 2];
    pack_factors<T>(s, factors, rounded);
  };
  walk_keys(
      c, true, true, [&](const char* keys) { project<T, D>(c, S::kQuery, keys, s); }, digest,
      [&](const char* keys) { collect<T, D>(factors, keys, y); });
  hopper::keep(y);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    omega[h] = quad_sum(omega[h]);
    rounded[h] = quad_sum(rounded[h]);
    n.inverse[h] = omega[h] == 0.0f ? 0.0f : 1.0f / omega[h];
    rounded[h] = rounded[h] == 0.0f ? 0.0f : 1.0f / rounded[h];
    if (omega[h] == 0.0f) n.peak[h] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < D / 2; ++i) y[i] *= rounded[i / 2 % 2];
}

// y, kbar, becomes kbar - q; zero for a row without keys.
template <class T, int D>
TILEWRIGHT_DEVICE void right_side(const Consumer<T, D>& c, const RowNumbers& n, float (&y)[D / 2]) {
  using S = FlashShape<T, D>;
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    float q0, q1;
    hopper::unpack_pair<T>(c.pair(S::kQuery, i), q0, q1);
    const bool none = n.inverse[i / 2 % 2] == 0.0f;
    y[i] = none ? 0.0f : y[i] - q0;
    y[i + 1] = none ? 0.0f : y[i + 1] - q1;
  }
}

// y = sum_j p_j a_j v_j for x in the left tile; total gets the sum of the rounded p_j a_j.
template <class T, int D>
TILEWRIGHT_DEVICE void gather_values(Consumer<T, D>& c, const RowNumbers& n, float (&y)[D / 2], float (&total)[2]) {
  using S = FlashShape<T, D>;
  constexpr int kCount = S::kKeys / 2;
  float s[kCount], along[kCount], level[2] = {0.0f, 0.0f};
  uint32_t factors[S::kKeys / 16][4];
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    level[i / 2 % 2] += pair_dot<T, D>(c.mean(i / 2), c.pair(S::kLeft, i));
    y[i] = y[i + 1] = 0.0f;
  }
  for (int h = 0; h < 2; ++h) {
    level[h] = 1.0f + quad_sum(level[h]);
    total[h] = 0.0f;
  }
  c.forget_addresses();
  for (int tile = c.block.first_tile; tile < c.block.last_tile; ++tile) {
    const bool mine = c.block.group_first[c.group] <= tile && tile < c.block.group_last[c.group];
    await(c, tile, false);
    const int keys = c.ring.at.stage;
    if (mine) {
      hopper::wgmma_fence();
      project<T, D>(c, S::kQuery, c.ring.tile(keys), s);
      project<T, D>(c, S::kLeft, c.ring.tile(keys), along);
      hopper::wgmma_commit();
      hopper::wgmma_wait<0>();
      hopper::keep(s);
      hopper::keep(along);
      weigh_tile(c, n, tile, s);
#pragma unroll
      for (int i = 0; i < kCount; ++i) s[i] *= n.inverse[i / 2 % 2] * (level[i / 2 % 2] - along[i]);
      pack_factors<T>(s, factors, total);
    }
    release(c, keys);
    c.ring.at.advance();
    await(c, tile, true);
    const int values = c.ring.at.stage;
    if (mine) {
      hopper::wgmma_fence();
      collect<T, D>(factors, c.ring.tile(values), y);
      hopper::wgmma_commit();
      hopper::wgmma_wait<0>();
      hopper::keep(y);
    }
    release(c, values);
    c.ring.at.advance();
  }
  for (int h = 0; h < 2; ++h) total[h] = quad_sum(total[h]);
  c.forget_addresses();
}

// x of the row into the left tile, rounded; returns (kbar - q).x of the two rows in `leverage`. A row that cannot be solved
// is NaN.
template <class T, int D>
TILEWRIGHT_DEVICE void take_solution(Consumer<T, D>& c, const RowNumbers& n, float* solutions, const Shape& shape,
                                     bool given, float (&leverage)[2]) {
  using S = FlashShape<T, D>;
  float* const x[2] = {solution_row(c, solutions, shape, 0), solution_row(c, solutions, shape, 1)};
  bool spoilt[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    leverage[h] = 0.0f;
    const float limit = c.number(RowNumber::kLimit, h);
    spoilt[h] = !given && (limit - limit != 0.0f || c.number(RowNumber::kLambda, h) != c.number(RowNumber::kLambda, h));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll 2
    for (int i = 2 * h; i < D / 2; i += 4) {
      FloatPair value{0.0f, 0.0f};
      if (c.valid(h) && c.col(i) < shape.key_size) {
        auto* at = reinterpret_cast<FloatPair*>(x[h] + c.col(i));
        value = *at;
        if (spoilt[h]) value.low = value.high = hopper::bits_float(0x7fc00000u);
        if (spoilt[h]) *at = value;
      }
      float mean[2], q[2];
      hopper::unpack_pair<T>(c.mean(i / 2), mean[0], mean[1]);
      hopper::unpack_pair<T>(c.pair(S::kQuery, i), q[0], q[1]);
      leverage[h] += (mean[0] - q[0]) * value.low + (mean[1] - q[1]) * value.high;
      c.pair(S::kLeft, i) = hopper::pack_pair<T>(value.low, value.high);
    }
  }
  for (int h = 0; h < 2; ++h) leverage[h] = n.inverse[h] == 0.0f ? 0.0f : quad_sum(leverage[h]);
  hopper::fence_async_shared();
  join_group(c);
}

template <class T, int D>
TILEWRIGHT_DEVICE void write_rows(const Consumer<T, D>& c, const RowNumbers& n, const FlashForwardParams<T>& p,
                                  const float (&y)[D / 2], const float (&total)[2], const float (&leverage)[2]) {
  const int64_t at[2] = {c.at(0, p.shape), c.at(1, p.shape)};
  const int value_size = static_cast<int>(p.shape.value_size);
  float factor[2];
  for (int h = 0; h < 2; ++h) {
    factor[h] = total[h] > 0.5f ? 1.0f / total[h] : 1.0f;
    if (c.valid(h) && c.marks()[c.row(h)] != 0) factor[h] = hopper::bits_float(0x7fc00000u);
  }
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    const int h = i / 2 % 2;
    if (!c.valid(h) || c.col(i) >= value_size) continue;
    *reinterpret_cast<uint32_t*>(p.o + at[h] * value_size + c.col(i)) =
        hopper::pack_pair<T>(y[i] * factor[h], y[i + 1] * factor[h]);
  }
  if (p.rows == nullptr || c.thread % 4 != 0) return;
  for (int h = 0; h < 2; ++h) {
    if (!c.valid(h)) continue;
    const float limit = c.number(RowNumber::kLimit, h);
    float* record = p.rows + at[h] * RowRecord::kSize;
    record[RowRecord::kPeak] = n.peak[h] / kLog2E;
    record[RowRecord::kOmega] = n.inverse[h] == 0.0f ? 0.0f : 1.0f / n.inverse[h];
    record[RowRecord::kLeverage] = leverage[h];
    record[RowRecord::kResidual] =
        limit == 0.0f ? 0.0f : tolerance<T>(p.options) * sqrtf(c.number(RowNumber::kSquare, h) / limit);
    p.iterations[at[h]] = static_cast<int32_t>(c.number(RowNumber::kCount, h));
  }
}

template <class T, int D>
TILEWRIGHT_DEVICE void forward_consumer(const FlashForwardParams<T>& p, char* memory) {
  using S = FlashShape<T, D>;
  Consumer<T, D> c = make_consumer<T, D>(memory, p.options);
  c.forget_addresses();
  RowNumbers n;
  float y[D / 2], total[2], leverage[2] = {0.0f, 0.0f};
  const bool given = p.options.solver == Solver::kGiven;
  n.scale = static_cast<float>(p.options.scale) * kLog2E;
  hopper::wait(reinterpret_cast<hopper::Barrier*>(memory + S::kBarriers)[2 * S::kStages], 0);
  gather_statistics(c, n, y);
  for (int h = 0; h < 2; ++h) {
    if (c.valid(h) && c.marks()[c.row(h)] != 0) n.inverse[h] = hopper::bits_float(0x7fc00000u);
  }
  if (!given) set_ridges(c, n, p.options, p.shape, p.ridge);
  keep_mean(c, y);
  right_side(c, n, y);
  start_solve(c, n, y, p.options, given);
  if (!given) solve_rows(c, n, p.x, p.options, p.shape, y);
  take_solution(c, n, given ? const_cast<float*>(p.given) : p.x, p.shape, given, leverage);
  gather_values(c, n, y, total);
  write_rows(c, n, p, y, total, leverage);
}

template <class T, int D>
TILEWRIGHT_DEVICE void forward_producer(const FlashForwardParams<T>& p, char* memory, int head) {
  using S = FlashShape<T, D>;
  const QueryBlock block = *reinterpret_cast<const QueryBlock*>(memory + S::kBlock);
  Ring<T, D> ring = make_ring<T, D>(memory);
  const bool first_thread = threadIdx.x == 0;
  const int kv_head = static_cast<int>(head / (p.shape.heads / p.shape.kv_heads));
  const int64_t first_key = block.segment.first_key;
  if (first_thread) {
    hopper::Barrier& full = ring.full[2 * S::kStages];
    hopper::arrive_expect(full, kGroups * S::RowTile::kBytes);
    load_rows<T, D>(p.q, memory + S::kQuery, full, block, head);
  }
  const auto send = [&](bool values) {
    if (!first_thread) return;
    for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
      const int64_t row = first_key + static_cast<int64_t>(tile) * S::kKeys;
      load_keys(ring, p.k, kv_head, row);
      if (values) load_keys(ring, p.v, kv_head, row);
    }
  };
  send(false);
  if (p.options.solver != Solver::kGiven) {
    for (int parity = 0; hear_decision<T, D>(memory, parity); parity ^= 1) send(false);
  }
  send(true);
}

template <class T, int D>
__global__ void __launch_bounds__(kFlashThreads, 1) flash_forward(const __grid_constant__ FlashForwardParams<T> p) {
  char* memory = hopper::shared_memory();
  if (!open_block<T, D>(p.options, p.sequences, memory)) return;
  const int head = static_cast<int>(blockIdx.y);
  if (threadIdx.x < 128) {
    hopper::lower_registers<kProducerRegisters>();
    if (threadIdx.x < 32) forward_producer<T, D>(p, memory, head);
  } else {
    hopper::raise_registers<kConsumerRegisters>();
    forward_consumer<T, D>(p, memory);
  }
}

}  // namespace tilewright::local_linear_attention::cuda
