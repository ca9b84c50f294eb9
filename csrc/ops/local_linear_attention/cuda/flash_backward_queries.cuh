// SPDX-License-Identifier: Apache-2.0
// Backward pass over queries in the tensor-core form: dq, dlambda or dx, and what the pass over keys needs of a row. The
// formulas are those of cpu/backward_queries.h; precision as in flash_solve.cuh.
//
//   first walk   peak, omega, kbar and g = sum_j p_j gamma_j          3 products
//   second       t = sum_j p_j (gamma_j - g)(k_j - kbar)              3
//   iterations   (Cov + lambda I) u = t                               3 each
//   last         sum_j p_j e_j a_j k_j                                5
#pragma once

#include "ops/local_linear_attention/cuda/flash_solve.cuh"

namespace tilewright::local_linear_attention::cuda {

// What the pass over keys needs of a row; [HQ, N], so that rows of a head lie together.
struct alignas(16) FlashGradRecord {
  float peak, inverse;  // of the weights; peak in units of the power of 2
  float value, mean;  // g; what is taken off e_j a_j
  float key_x, key_u;  // kbar.x, kbar.u, as rounded for the products
  float unused[2];
};

template <class T>
struct FlashQueriesParams {
  hopper::TensorMap q, k, v, grad;
  Shape shape;
  Options options;
  Sequences sequences;
  const float* ridge;
  const float* x;  // [N, HQ, K]
  T* dq;
  float* dridge;  // null for kGiven
  float* dx;  // null but for kGiven
  float* u;  // [N, HQ, K]; null for kGiven
  T *rounded_x, *rounded_u;  // [N, HQ, K]; the latter -u, so that gamma - u.k is one sum
  FlashGradRecord* records;
};

// The tiles of x and -u, where the residuals were.
template <class T, int D>
struct TiltTiles {
  using S = FlashShape<T, D>;
  static constexpr int kX = S::kResidual;
  static constexpr int kU = kX + kGroups * S::RowTile::kBytes;
  static_assert(kU + kGroups * S::RowTile::kBytes <= S::kMean);
};

// Walks over tiles of keys and values together: step(tile, keys, values) does all products of a pair.
template <class T, int D, class Step>
TILEWRIGHT_DEVICE void walk_pairs(Consumer<T, D>& c, bool mark, const Step& step) {
  for (int tile = c.block.first_tile; tile < c.block.last_tile; ++tile) {
    const bool mine = c.block.group_first[c.group] <= tile && tile < c.block.group_last[c.group];
    await(c, tile, mark);
    const int keys = c.ring.at.stage;
    c.ring.at.advance();
    await(c, tile, mark);
    const int values = c.ring.at.stage;
    c.ring.at.advance();
    if (mine) step(tile, c.ring.tile(keys), c.ring.tile(values));
    release(c, keys);
    release(c, values);
  }
  join_group(c);
  c.forget_addresses();
}

// peak, omega, kbar (in y) and g by running maxima; do is in the left tile.
template <class T, int D>
TILEWRIGHT_DEVICE void gather_both(Consumer<T, D>& c, RowNumbers& n, float (&y)[D / 2], float (&value)[2]) {
  using S = FlashShape<T, D>;
  constexpr int kCount = S::kKeys / 2;
  const float lowest = hopper::bits_float(0xff800000u);
  float s[kCount], gamma[kCount], omega[2], rounded[2] = {0.0f, 0.0f};
  uint32_t factors[S::kKeys / 16][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) y[i] = 0.0f;
  for (int h = 0; h < 2; ++h) {
    n.peak[h] = lowest;
    omega[h] = value[h] = 0.0f;
  }
  walk_pairs(c, true, [&](int tile, const char* keys, const char* values) {
    hopper::wgmma_fence();
    project<T, D>(c, S::kQuery, keys, s);
    project<T, D>(c, S::kLeft, values, gamma);
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    hopper::keep(s);
    hopper::keep(gamma);
    float most[2] = {n.peak[0], n.peak[1]}, base[2], shrink[2];
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] *= n.scale;
    if (!c.whole(tile)) {
      const Seen seen = c.seen();
#pragma unroll
      for (int i = 0; i < kCount; ++i) s[i] = c.sees(seen, i, tile) ? s[i] : lowest;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      most[h] = quad_max(most[h]);
      base[h] = most[h] == lowest ? 0.0f : most[h];
      shrink[h] = hopper::exp2_flushed(n.peak[h] - base[h]);
      n.peak[h] = most[h];
      omega[h] *= shrink[h];
      rounded[h] *= shrink[h];
      value[h] *= shrink[h];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      s[i] = hopper::exp2_flushed(s[i] - base[i / 2 % 2]);
      omega[i / 2 % 2] += s[i];
      value[i / 2 % 2] = fmaf(s[i], gamma[i], value[i / 2 % 2]);
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) y[i] *= shrink[i / 2 % 2];
    pack_factors<T>(s, factors, rounded);
    hopper::wgmma_fence();
    collect<T, D>(factors, keys, y);
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    hopper::keep(y);
  });
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    omega[h] = quad_sum(omega[h]);
    rounded[h] = quad_sum(rounded[h]);
    n.inverse[h] = omega[h] == 0.0f ? 0.0f : 1.0f / omega[h];
    rounded[h] = rounded[h] == 0.0f ? 0.0f : 1.0f / rounded[h];
    value[h] = quad_sum(value[h]) * n.inverse[h];
    if (omega[h] == 0.0f) n.peak[h] = 0.0f;
    if (c.valid(h) && c.marks()[c.row(h)] != 0) n.inverse[h] = value[h] = hopper::bits_float(0x7fc00000u);
  }
#pragma unroll
  for (int i = 0; i < D / 2; ++i) y[i] *= rounded[i / 2 % 2];
}

// y = t.
template <class T, int D>
TILEWRIGHT_DEVICE void project_values(Consumer<T, D>& c, const RowNumbers& n, float (&y)[D / 2],
                                      const float (&value)[2]) {
  using S = FlashShape<T, D>;
  constexpr int kCount = S::kKeys / 2;
  float s[kCount], gamma[kCount], drift[2] = {0.0f, 0.0f};
  uint32_t factors[S::kKeys / 16][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) y[i] = 0.0f;
  walk_pairs(c, false, [&](int tile, const char* keys, const char* values) {
    hopper::wgmma_fence();
    project<T, D>(c, S::kQuery, keys, s);
    project<T, D>(c, S::kLeft, values, gamma);
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    hopper::keep(s);
    hopper::keep(gamma);
    weigh_tile(c, n, tile, s);
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] *= n.inverse[i / 2 % 2] * (gamma[i] - value[i / 2 % 2]);
    pack_factors<T>(s, factors, drift);
    hopper::wgmma_fence();
    collect<T, D>(factors, keys, y);
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    hopper::keep(y);
  });
  for (int h = 0; h < 2; ++h) drift[h] = quad_sum(drift[h]);
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    float low, high;
    hopper::unpack_pair<T>(c.mean(i / 2), low, high);
    y[i] -= drift[i / 2 % 2] * low;
    y[i + 1] -= drift[i / 2 % 2] * high;
  }
}

// A row's products with x and u.
struct Tilts {
  float key_x[2], key_u[2], both[2];  // kbar.x, kbar.u, u.x
};

// dx of Parallax is -t, which is in y.
template <class T, int D>
TILEWRIGHT_DEVICE void write_tilt_gradient(const Consumer<T, D>& c, const FlashQueriesParams<T>& p,
                                           const float (&y)[D / 2]) {
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    const int h = i / 2 % 2;
    if (!c.valid(h) || c.col(i) >= p.shape.key_size) continue;
    *reinterpret_cast<FloatPair*>(p.dx + c.at(h, p.shape) * p.shape.key_size + c.col(i)) = FloatPair{-y[i], -y[i + 1]};
  }
}

// x and -u as tiles, in memory for the pass over keys too.
template <class T, int D>
TILEWRIGHT_DEVICE void take_tilts(Consumer<T, D>& c, const FlashQueriesParams<T>& p, Tilts& tilts) {
  using Tiles = TiltTiles<T, D>;
  const bool given = p.options.solver == Solver::kGiven;
  bool spoilt[2];
  for (int h = 0; h < 2; ++h) {
    tilts.key_x[h] = tilts.key_u[h] = tilts.both[h] = 0.0f;
    const float limit = c.number(RowNumber::kLimit, h);
    spoilt[h] = limit - limit != 0.0f || (!given && c.number(RowNumber::kLambda, h) != c.number(RowNumber::kLambda, h));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll 2
    for (int i = 2 * h; i < D / 2; i += 4) {
      FloatPair x{0.0f, 0.0f}, u{0.0f, 0.0f};
      const bool inside = c.valid(h) && c.col(i) < p.shape.key_size;
      const int64_t at = inside ? c.at(h, p.shape) * p.shape.key_size + c.col(i) : 0;
      if (inside) x = *reinterpret_cast<const FloatPair*>(p.x + at);
      if (inside && !given) u = *reinterpret_cast<const FloatPair*>(p.u + at);
      if (inside && !given && spoilt[h]) u.low = u.high = hopper::bits_float(0x7fc00000u);
      const uint32_t word_x = hopper::pack_pair<T>(x.low, x.high), word_u = hopper::pack_pair<T>(-u.low, -u.high);
      c.pair(Tiles::kX, i) = word_x;
      c.pair(Tiles::kU, i) = word_u;
      if (inside) *reinterpret_cast<uint32_t*>(p.rounded_x + at) = word_x;
      if (inside) *reinterpret_cast<uint32_t*>(p.rounded_u + at) = word_u;
      tilts.key_x[h] += pair_dot<T, D>(c.mean(i / 2), word_x);
      tilts.key_u[h] -= pair_dot<T, D>(c.mean(i / 2), word_u);
      tilts.both[h] += x.low * u.low + x.high * u.high;
    }
  }
  for (int h = 0; h < 2; ++h) {
    tilts.key_x[h] = quad_sum(tilts.key_x[h]);
    tilts.key_u[h] = quad_sum(tilts.key_u[h]);
    tilts.both[h] = quad_sum(tilts.both[h]);
  }
  hopper::fence_async_shared();
  join_group(c);
  c.forget_addresses();
}

// y = sum_j p_j e_j a_j k_j, and the sum of its rounded factors.
template <class T, int D>
TILEWRIGHT_DEVICE void multiply_factors(Consumer<T, D>& c, const RowNumbers& n, const Tilts& tilts,
                                        const float (&value)[2], float (&y)[D / 2], float (&sum)[2]) {
  using S = FlashShape<T, D>;
  using Tiles = TiltTiles<T, D>;
  constexpr int kCount = S::kKeys / 2;
  float s[kCount], along[kCount];  // two at a time: more do not fit beside the sums
  uint32_t factors[S::kKeys / 16][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) y[i] = 0.0f;
  sum[0] = sum[1] = 0.0f;
  const auto multiply = [&](int row_tile, const char* tile, float (&to)[kCount]) {
    hopper::wgmma_fence();
    project<T, D>(c, row_tile, tile, to);
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    hopper::keep(to);
  };
  walk_pairs(c, false, [&](int tile, const char* keys, const char* values) {
    multiply(S::kQuery, keys, s);
    weigh_tile(c, n, tile, s);
    multiply(Tiles::kX, keys, along);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      s[i] *= n.inverse[i / 2 % 2] * (1.0f + tilts.key_x[i / 2 % 2] - along[i]);
    }
    hopper::wgmma_fence();
    project<T, D>(c, S::kLeft, values, along);
    project<T, D>(c, Tiles::kU, keys, along, true);  // gamma - u.k
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    hopper::keep(along);
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] *= along[i] - (value[i / 2 % 2] - tilts.key_u[i / 2 % 2]);
    pack_factors<T>(s, factors, sum);
    hopper::wgmma_fence();
    collect<T, D>(factors, keys, y);
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    hopper::keep(y);
  });
  for (int h = 0; h < 2; ++h) sum[h] = quad_sum(sum[h]);
}

template <class T, int D>
TILEWRIGHT_DEVICE void write_gradients(Consumer<T, D>& c, const RowNumbers& n, const FlashQueriesParams<T>& p,
                                       const float (&y)[D / 2], const float (&sum)[2], const float (&value)[2],
                                       const Tilts& tilts) {
  const bool given = p.options.solver == Solver::kGiven;
  const bool weighs = !given && (p.options.absolute || !p.options.ridge_grad);
  const float scale = static_cast<float>(p.options.scale);
  float extra[2];
  for (int h = 0; h < 2; ++h)
    extra[h] = weighs && n.inverse[h] != 0.0f ? c.number(RowNumber::kLambda, h) * tilts.both[h] : 0.0f;
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    const int h = i / 2 % 2;
    if (i % 16 == 0) c.forget_addresses();
    if (!c.valid(h) || c.col(i) >= p.shape.key_size) continue;
    const int64_t at = c.at(h, p.shape) * p.shape.key_size + c.col(i);
    FloatPair u{0.0f, 0.0f};
    float mean[2];
    hopper::unpack_pair<T>(c.mean(i / 2), mean[0], mean[1]);
    if (!given) u = *reinterpret_cast<const FloatPair*>(p.u + at);
    const float off = sum[h] + extra[h];
    *reinterpret_cast<uint32_t*>(p.dq + at) =
        hopper::pack_pair<T>(scale * (y[i] - off * mean[0]) + u.low, scale * (y[i + 1] - off * mean[1]) + u.high);
  }
  if (c.thread % 4 != 0) return;
  for (int h = 0; h < 2; ++h) {
    if (!c.valid(h)) continue;
    const int64_t at = c.at(h, p.shape), row = at / p.shape.heads, head = at % p.shape.heads;
    const float factor = p.options.absolute ? fminf(exp2f(-n.peak[h]) * n.inverse[h], 1e30f) : 1.0f;
    if (!given) p.dridge[at] = tilts.both[h] * factor;
    FlashGradRecord& record = p.records[head * p.sequences.rows + row];
    record.peak = n.peak[h];
    record.inverse = n.inverse[h];
    record.value = value[h];
    record.mean = sum[h] + extra[h];
    record.key_x = tilts.key_x[h];
    record.key_u = tilts.key_u[h];
    record.unused[0] = record.unused[1] = 0.0f;
  }
}

template <class T, int D>
TILEWRIGHT_DEVICE void queries_consumer(const FlashQueriesParams<T>& p, char* memory) {
  using S = FlashShape<T, D>;
  Consumer<T, D> c = make_consumer<T, D>(memory, p.options);
  c.forget_addresses();
  RowNumbers n;
  Tilts tilts;
  float y[D / 2], value[2], sum[2];
  const bool given = p.options.solver == Solver::kGiven;
  n.scale = static_cast<float>(p.options.scale) * kLog2E;
  hopper::Barrier& rows_full = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriers)[2 * S::kStages];
  hopper::wait(rows_full, 0);
  gather_both(c, n, y, value);
  keep_mean(c, y);
  if (!given) set_ridges(c, n, p.options, p.shape, p.ridge);
  project_values(c, n, y, value);
  start_solve(c, n, y, p.options, given);
  bool mine;
  if (given) {
    write_tilt_gradient(c, p, y);
    decide(c, n, 0, mine);  // no row is active
  } else {
    solve_rows(c, n, p.u, p.options, p.shape, y);
  }
  meet(kCleanBarrier, kConsumers);  // residuals of both groups give way to tiles
  take_tilts(c, p, tilts);
  hopper::wait(rows_full, 1);
  multiply_factors(c, n, tilts, value, y, sum);
  write_gradients(c, n, p, y, sum, value, tilts);
}

template <class T, int D>
TILEWRIGHT_DEVICE void queries_producer(const FlashQueriesParams<T>& p, char* memory, int head) {
  using S = FlashShape<T, D>;
  const QueryBlock block = *reinterpret_cast<const QueryBlock*>(memory + S::kBlock);
  Ring<T, D> ring = make_ring<T, D>(memory);
  const bool first_thread = threadIdx.x == 0;
  const int kv_head = static_cast<int>(head / (p.shape.heads / p.shape.kv_heads));
  hopper::Barrier& rows_full = ring.full[2 * S::kStages];
  if (first_thread) {
    hopper::arrive_expect(rows_full, 2 * kGroups * S::RowTile::kBytes);
    load_rows<T, D>(p.q, memory + S::kQuery, rows_full, block, head);
    load_rows<T, D>(p.grad, memory + S::kLeft, rows_full, block, head);
  }
  const auto send = [&](bool values) {
    if (!first_thread) return;
    for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
      const int64_t row = block.segment.first_key + static_cast<int64_t>(tile) * S::kKeys;
      load_keys(ring, p.k, kv_head, row);
      if (values) load_keys(ring, p.v, kv_head, row);
    }
  };
  send(true);
  send(true);
  // start_solve has overwritten do in the left tiles; the last decision comes after the last use of what replaced it.
  for (int parity = 0; hear_decision<T, D>(memory, parity); parity ^= 1) send(false);
  if (first_thread) {
    hopper::arrive_expect(rows_full, kGroups * S::RowTile::kBytes);
    load_rows<T, D>(p.grad, memory + S::kLeft, rows_full, block, head);
  }
  send(true);
}

template <class T, int D>
__global__ void __launch_bounds__(kFlashThreads, 1)
    flash_backward_queries(const __grid_constant__ FlashQueriesParams<T> p) {
  char* memory = hopper::shared_memory();
  if (!open_block<T, D>(p.options, p.sequences, memory)) return;
  if (threadIdx.x < 128) {
    hopper::lower_registers<kProducerRegisters>();
    if (threadIdx.x < 32) queries_producer<T, D>(p, memory, static_cast<int>(blockIdx.y));
  } else {
    hopper::raise_registers<kConsumerRegisters>();
    queries_consumer<T, D>(p, memory);
  }
}

}  // namespace tilewright::local_linear_attention::cuda
