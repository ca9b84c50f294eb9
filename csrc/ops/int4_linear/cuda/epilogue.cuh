// SPDX-License-Identifier: Apache-2.0
// From a consumer's totals to y: joining the pieces of a split tile, scales of tokens, bias, and rows of features.
#pragma once

#include "ops/int4_linear/cuda/resident.cuh"

namespace tilewright::int4_linear {

TILEWRIGHT_DEVICE void consumer_sync(int consumer) { hopper::named_sync(kConsumerBarrier + consumer, 128); }

// --- Pieces of a split tile.

// Where a consumer's piece of a block lies: 4 registers of each thread side by side, the next 4 kQuad floats on.
inline constexpr int kQuad = 4 * 128;

template <class C>
TILEWRIGHT_DEVICE float* piece_at(const MatrixParams& p, int block, int tile, int consumer, int b) {
  const int64_t slot = static_cast<int64_t>(p.work.piece_slot(block, tile)) * C::kCluster + rank_in_cluster<C>();
  const int64_t first = static_cast<int64_t>(consumer * C::kBlocks + b) * (C::kRegisters * 128);
  return p.pieces + slot * p.piece_floats + first + threadIdx.x % 128 * 4;
}

template <class C>
TILEWRIGHT_DEVICE void store_piece(float* piece, const float (&total)[C::kRegisters]) {
#pragma unroll
  for (int i = 0; i < C::kRegisters; i += 4) {
    hopper::store_16(piece + i / 4 * kQuad, {hopper::float_bits(total[i]), hopper::float_bits(total[i + 1]),
                                             hopper::float_bits(total[i + 2]), hopper::float_bits(total[i + 3])});
  }
}

// Registers [first, first + Count) of the sum of all pieces, in the order of K, whoever adds them.
template <class C, int Count>
TILEWRIGHT_DEVICE void sum_pieces(const MatrixParams& p, int tile, int consumer, int b, int first,
                                  float (&sum)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) sum[i] = 0.0f;
  const int last_block = p.work.last_block(tile);
#pragma unroll 1
  for (int block = p.work.first_block(tile); block <= last_block; ++block) {
    const float* piece = piece_at<C>(p, block, tile, consumer, b) + first / 4 * kQuad;
#pragma unroll
    for (int i = 0; i < Count; i += 4) {
      const hopper::U128 quad = hopper::load_16(piece + i / 4 * kQuad);
      sum[i] += hopper::bits_float(quad.x);
      sum[i + 1] += hopper::bits_float(quad.y);
      sum[i + 2] += hopper::bits_float(quad.z);
      sum[i + 3] += hopper::bits_float(quad.w);
    }
  }
}

// Leaves this block's piece for the others; true for the block that comes last, which then has all of them to add. Each
// consumer counts on its own. The fences order a piece before its count, and the count before the reads of the others'.
template <class C>
TILEWRIGHT_DEVICE bool join(const MatrixParams& p, const Shared<C>& shared, int tile, int consumer, int here,
                            const float (&totals)[C::kBlocks][C::kRegisters]) {
#pragma unroll
  for (int b = 0; b < C::kBlocks; ++b) {
    if (b < here) store_piece<C>(piece_at<C>(p, cluster_index<C>(), tile, consumer, b), totals[b]);
  }
  __threadfence();
  consumer_sync(consumer);
  const int counter = (tile * C::kCluster + rank_in_cluster<C>()) * kConsumers + consumer;
  if (threadIdx.x % 128 == 0) shared.joined[consumer] = atomicAdd(p.counters + counter, 1);
  consumer_sync(consumer);
  if (shared.joined[consumer] != p.work.last_block(tile) - p.work.first_block(tile)) return false;
  __threadfence();
  return true;
}

// --- y.

TILEWRIGHT_DEVICE float load_number(const void* base, int64_t index, Number type) {
  if (type == Number::kFloat32) return static_cast<const float*>(base)[index];
  const uint16_t bits = static_cast<const uint16_t*>(base)[index];
  return type == Number::kBFloat16 ? hopper::to_float(hopper::bf16{bits}) : hopper::to_float(hopper::f16{bits});
}

TILEWRIGHT_DEVICE void store_number(void* base, int64_t index, Number type, float value) {
  if (type == Number::kFloat32) {
    static_cast<float*>(base)[index] = value;
  } else if (type == Number::kBFloat16) {
    static_cast<hopper::bf16*>(base)[index] = hopper::from_float<hopper::bf16>(value);
  } else {
    static_cast<hopper::f16*>(base)[index] = hopper::from_float<hopper::f16>(value);
  }
}

// Where the rows of a block go.
struct Target {
  int tile, consumer, b;
  const float* scales;     // of the tokens of the tile
  int64_t token, feature;  // the first of each
  float factor;
  bool joined;             // the sums are those of the pieces, not the totals at hand
};

TILEWRIGHT_DEVICE void store_quad(void* y, int64_t at, Number type, float v0, float v1, float v2, float v3) {
  if (type == Number::kFloat32) {
    hopper::store_16(static_cast<float*>(y) + at,
                     {hopper::float_bits(v0), hopper::float_bits(v1), hopper::float_bits(v2), hopper::float_bits(v3)});
    return;
  }
  const bool bf16 = type == Number::kBFloat16;
  const uint2 words = {bf16 ? hopper::pack_bf16x2(v0, v1) : hopper::pack_f16x2(v0, v1),
                       bf16 ? hopper::pack_bf16x2(v2, v3) : hopper::pack_f16x2(v2, v3)};
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(y) + at) = words;
}

TILEWRIGHT_DEVICE void add_quad(const void* from, int64_t at, Number type, float (&v)[4]) {
  float w[4];
  if (type == Number::kFloat32) {
    const hopper::U128 quad = hopper::load_16(static_cast<const float*>(from) + at);
    w[0] = hopper::bits_float(quad.x), w[1] = hopper::bits_float(quad.y);
    w[2] = hopper::bits_float(quad.z), w[3] = hopper::bits_float(quad.w);
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + at);
    if (type == Number::kBFloat16) {
      hopper::unpack_bf16x2(words.x, w[0], w[1]);
      hopper::unpack_bf16x2(words.y, w[2], w[3]);
    } else {
      hopper::unpack_f16x2(words.x, w[0], w[1]);
      hopper::unpack_f16x2(words.y, w[2], w[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] += w[i];
}

// Some tokens of a tile, from the staging [token][64 features] to y: sixteen threads write the 64 features of a token. The
// code of this is there for every turn of the accumulators, so it is kept short.
template <class C>
TILEWRIGHT_DEVICE void write_rows(const MatrixParams& p, const float* staging, const Target& to, int turn,
                                  const float (&bias)[4]) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int64_t feature = to.feature + thread % 16 * 4;
  const int64_t first_token = to.token + turn * C::kStagingTokens;
#pragma unroll
  for (int j = 0; j < C::kStagingTokens / 8; ++j) {
    const int t = thread / 16 + 8 * j;
    const hopper::U128 sums = hopper::load_16(staging + t * kStagingPitch + thread % 16 * 4);
    const float scale = to.scales[turn * C::kStagingTokens + t];
    float v[4] = {hopper::bits_float(sums.x), hopper::bits_float(sums.y), hopper::bits_float(sums.z),
                  hopper::bits_float(sums.w)};
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = v[i] * to.factor * scale + bias[i];
    const int64_t at = (first_token + t) * p.n + feature;
    if (first_token + t < p.m && feature < p.n) {
      if (p.residual != nullptr) add_quad(p.residual, at, p.y_type, v);
      store_quad(p.y, at, p.y_type, v[0], v[1], v[2], v[3]);
    }
  }
}

// The same for rows of y that are not aligned to four features: one by one.
template <class C>
TILEWRIGHT_DEVICE void write_ragged_rows(const MatrixParams& p, const float* staging, const Target& to, int turn) {
  const int64_t first_token = to.token + turn * C::kStagingTokens;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 128; i < C::kStagingTokens * 64; i += 128) {
    const int t = i / 64;
    const int64_t token = first_token + t, feature = to.feature + i % 64;
    if (token >= p.m || feature >= p.n) continue;
    const float bias = p.bias == nullptr ? 0.0f : load_number(p.bias, feature, p.bias_type);
    const float scale = to.scales[turn * C::kStagingTokens + t];
    float value = staging[t * kStagingPitch + i % 64] * to.factor * scale + bias;
    if (p.residual != nullptr) value += load_number(p.residual, token * p.n + feature, p.y_type);
    store_number(p.y, token * p.n + feature, p.y_type, value);
  }
}

// The accumulators hold features by tokens, y is tokens by features: a turn through shared memory, some tokens at a time.
template <class C>
TILEWRIGHT_DEVICE void write_block(const MatrixParams& p, float* staging, const Target& to,
                                   const float (&total)[C::kRegisters]) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  constexpr int kPerTurn = C::kStagingTokens / 2;   // registers
  float bias[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int i = 0; i < 4; ++i) {
    const int64_t feature = to.feature + thread % 16 * 4 + i;
    if (p.bias != nullptr && feature < p.n) bias[i] = load_number(p.bias, feature, p.bias_type);
  }
#pragma unroll
  for (int turn = 0; turn < C::kTokens / C::kStagingTokens; ++turn) {
    const int64_t token = to.token + turn * C::kStagingTokens;
    if (token < p.m) {
      float values[kPerTurn];
      if (to.joined) {
        sum_pieces<C>(p, to.tile, to.consumer, to.b, turn * kPerTurn, values);
      } else {
#pragma unroll
        for (int i = 0; i < kPerTurn; ++i) values[i] = total[turn * kPerTurn + i];
      }
      consumer_sync(to.consumer);
#pragma unroll
      for (int i = 0; i < kPerTurn; ++i) {
        const int row = hopper::accumulator_row(thread, i), col = hopper::accumulator_col(thread, i);
        staging[col * kStagingPitch + row] = values[i];
      }
      consumer_sync(to.consumer);
      if (p.n % 4 == 0) {
        write_rows<C>(p, staging, to, turn, bias);
      } else {
        write_ragged_rows<C>(p, staging, to, turn);
      }
    }
  }
}

// --- A segment from its first column to y.

template <class C>
TILEWRIGHT_DEVICE void finish_segment(const MatrixParams& p, const Shared<C>& shared, const Segment& segment,
                                      int consumer, const float (&totals)[C::kBlocks][C::kRegisters]) {
  const int first = first_row_block<C>(p, segment.tile) + (C::kTurns ? 0 : consumer * C::kBlocks);
  const int here = min(C::kBlocks, p.row_blocks - first);
  const bool whole = segment.first == 0 && segment.last == p.work.k_tiles;
  if (!whole && !join<C>(p, shared, segment.tile, consumer, here, totals)) return;
  float* staging = shared.staging + (C::kTurns ? 0 : consumer * C::kStagingTokens * kStagingPitch);
  const int64_t token = static_cast<int64_t>(segment.tile % p.token_tiles) * C::kTokens;
  float* scales = shared.scales + consumer * C::kTokens;
  if constexpr (!C::kResident) {
    consumer_sync(consumer);  // those of the tile before are no longer read
    const int thread = static_cast<int>(threadIdx.x) % 128;
    if (thread < C::kTokens) scales[thread] = token + thread < p.m ? p.x_scales[token + thread] : 0.0f;
  }
  const float unit = C::kForm == Form::kFold ? 1.0f : static_cast<float>(1 << Int4Hopper::kExponent);
  const float factor = unit * (1.0f / *p.per_tensor_scale);
#pragma unroll
  for (int b = 0; b < C::kBlocks; ++b) {
    const int64_t feature = static_cast<int64_t>(first + b) * Int4Hopper::kRows;
    if (b < here)
      write_block<C>(p, staging, {segment.tile, consumer, b, scales, token, feature, factor, !whole}, totals[b]);
  }
}

// Consumers that took turns: the second one's totals go to the first, which has the rest of the work. True for the first.
template <class C>
TILEWRIGHT_DEVICE bool hand_over(const Shared<C>& shared, int consumer, float (&total)[C::kRegisters]) {
  constexpr int kWritten = kHandOverBarrier, kTaken = kHandOverBarrier + 1, kBoth = 128 * kConsumers;
  float* handed = shared.staging + C::kStagingTokens * kStagingPitch + threadIdx.x % 128 * 4;
  if (consumer == 1) store_piece<C>(handed, total);
  hopper::named_sync(kWritten, kBoth);
  if (consumer == 0) {
#pragma unroll
    for (int i = 0; i < C::kRegisters; ++i) total[i] += handed[i / 4 * kQuad + i % 4];
  }
  hopper::named_sync(kTaken, kBoth);
  return consumer == 0;
}

template <class C>
TILEWRIGHT_DEVICE void consume(const MatrixParams& p, const Shared<C>& shared, int consumer) {
  const int block = cluster_index<C>();
  Segment segment{};
  bool waited = !p.overlap;
  if constexpr (C::kResident) round_tokens(p, shared);
  Turns turns(consumer);
  Ring ring;
  for (uint32_t index[1] = {0}; segment_of(p.work, block, static_cast<int>(index[0]), segment); ++index[0]) {
    const int here = p.row_blocks - first_row_block<C>(p, segment.tile) - (C::kTurns ? 0 : consumer * C::kBlocks);
    if (here <= 0) {
      pass_segment(p, shared, segment, ring, turns);
      ring.skip(segment.last - segment.first, p.stages);
      continue;
    }
    float totals[C::kBlocks][C::kRegisters] = {};
    if constexpr (C::kTurns) {
      multiply_turns<C>(p, shared, segment, ring, totals[0], consumer);
    } else {
      if constexpr (C::kFine) {
        multiply_fine_rows<C>(p, shared, segment, ring, totals[0], consumer);
      } else {
        multiply_rows<C>(p, shared, segment, ring, totals, turns, here);
      }
    }
    // Nothing of the segment stays in registers beside the products: it is worked out again.
    hopper::keep(index);
    segment_of(p.work, block, static_cast<int>(index[0]), segment);
    ring.skip(segment.last - segment.first, p.stages);
    if constexpr (C::kTurns) {
      if (!hand_over<C>(shared, consumer, totals[0])) continue;
    }
    if (!waited) hopper::wait_for_previous_kernel();
    waited = true;
    finish_segment<C>(p, shared, segment, consumer, totals);
  }
}

// The barriers are there for every block that uses them.
template <class C>
TILEWRIGHT_DEVICE void meet() {
  if constexpr (C::kCluster == 1) {
    __syncthreads();
  } else {
    hopper::cluster_sync();
  }
}

template <class C>
__global__ void __launch_bounds__(kMatrixThreads, 1) int4_fp8_kernel(const __grid_constant__ MatrixParams p) {
  const Shared<C> shared(p);
  if (threadIdx.x == 0) {
    hopper::prefetch(p.chunks);
    if constexpr (!C::kResident) hopper::prefetch(p.x);
    for (int stage = 0; stage < p.stages; ++stage) {
      hopper::init(shared.full[stage], 1);
      hopper::init(shared.empty[stage], C::kReleases);
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) hopper::init(shared.turn[consumer], 4);
    hopper::fence_barrier_init();
  }
  meet<C>();
  // The same in all lanes, and the compiler is to know it: products in branches that could diverge are taken one by one.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    hopper::lower_registers<24>();
    if (threadIdx.x == 0) produce<C>(p, shared);
  } else {
    hopper::raise_registers<240>();
    consume<C>(p, shared, group - 1);
  }
  if constexpr (C::kCluster > 1) {
    __syncwarp();
    hopper::cluster_sync();   // no block leaves while another may still write to it
  }
}

}  // namespace tilewright::int4_linear
