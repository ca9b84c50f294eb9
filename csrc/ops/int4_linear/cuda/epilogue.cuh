// SPDX-License-Identifier: Apache-2.0
// From a consumer's totals to y: joining the pieces of a split tile, scales of tokens, bias, and rows of features.
#pragma once

#include "ops/int4_linear/cuda/consumer.cuh"
#include "ops/int4_linear/cuda/numbers.cuh"

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

// The sum of all pieces, in the order of K, whoever adds them.
template <class C>
TILEWRIGHT_DEVICE void sum_pieces(const MatrixParams& p, int tile, int consumer, int b, float (&sum)[C::kRegisters]) {
#pragma unroll
  for (int i = 0; i < C::kRegisters; ++i) sum[i] = 0.0f;
  const int last_block = p.work.last_block(tile);
#pragma unroll 1
  for (int block = p.work.first_block(tile); block <= last_block; ++block) {
    const float* piece = piece_at<C>(p, block, tile, consumer, b);
#pragma unroll
    for (int i = 0; i < C::kRegisters; i += 4) {
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
  if (threadIdx.x % 128 == 0) shared.joined(consumer) = atomicAdd(p.counters + counter, 1);
  consumer_sync(consumer);
  if (shared.joined(consumer) != p.work.last_block(tile) - p.work.first_block(tile)) return false;
  __threadfence();
  return true;
}

// --- y.

// Where the rows of a block go.
struct Target {
  int thread, consumer;
  const float* scales;     // of the tokens of the tile, with all that is the same for every row
  int64_t token, feature;  // the first of each
};

// Rows of 16-bit numbers, 8 at a time, between memory and the staging [token][64 features].
template <class C>
TILEWRIGHT_DEVICE void store_rows(const MatrixParams& p, const char* staging, const Target& to) {
  const int thread = to.thread;
  const int64_t feature = to.feature + thread % 8 * 8;
  if (feature >= p.n) return;
#pragma unroll 2
  for (int t = thread / 8; t < C::kTokens && to.token + t < p.m; t += 16) {
    hopper::store_16(static_cast<uint16_t*>(p.y) + (to.token + t) * p.n + feature,
                     hopper::load_16(staging + t * kNarrowPitch + thread % 8 * 16));
  }
}
template <class C>
TILEWRIGHT_DEVICE void load_residual(const MatrixParams& p, char* staging, const Target& to) {
  const int thread = to.thread;
  const int64_t feature = to.feature + thread % 8 * 8;
#pragma unroll 2
  for (int t = thread / 8; t < C::kTokens; t += 16) {
    hopper::U128 values{0, 0, 0, 0};
    if (feature < p.n && to.token + t < p.m) {
      values = hopper::load_16(static_cast<const uint16_t*>(p.residual) + (to.token + t) * p.n + feature);
    }
    hopper::store_16(staging + t * kNarrowPitch + thread % 8 * 16, values);
  }
}

// The accumulators hold features by tokens, y is tokens by features: 8 x 8 matrices are turned on their way to shared memory,
// and those of the residual on their way from there.
template <class C>
TILEWRIGHT_DEVICE void write_narrow(const MatrixParams& p, char* staging, const Target& to,
                                    const float (&total)[C::kRegisters]) {
  const int thread = to.thread, lane = thread % 32;
  const int row = hopper::accumulator_row(thread, 0);
  float bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t feature = to.feature + row + 8 * h;
    bias[h] = p.bias != nullptr && feature < p.n ? load_number(p.bias, feature, p.bias_type) : 0.0f;
  }
  consumer_sync(to.consumer);
  if (p.residual != nullptr) {
    load_residual<C>(p, staging, to);
    consumer_sync(to.consumer);
  }
  // Lanes 8 i to 8 i + 7 address the tokens of matrix i: features 16 w to + 7, to + 15, and the same of the next 8 tokens.
  char* at = staging + (lane / 16 * 8 + lane % 8) * kNarrowPitch + thread / 32 * 32 + lane / 8 % 2 * 16;
#pragma unroll
  for (int i = 0; i < C::kRegisters; i += 8, at += 16 * kNarrowPitch) {
    uint32_t words[4] = {};
    if (p.residual != nullptr) hopper::ldmatrix_x4_transposed(words, at);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int first = i + 2 * j;
      const float* scale = to.scales + hopper::accumulator_col(thread, first);
      float low = 0.0f, high = 0.0f;
      if (p.residual != nullptr) unpack_pair(words[j], p.y_type, low, high);
      low += fmaf(total[first], scale[0], bias[j % 2]);
      high += fmaf(total[first + 1], scale[1], bias[j % 2]);
      words[j] = pack_pair(low, high, p.y_type);
    }
    hopper::stmatrix_x4_transposed(at, words);
  }
  consumer_sync(to.consumer);
  store_rows<C>(p, staging, to);
}

// Any y, one number at a time, through a staging of floats.
template <class C>
TILEWRIGHT_DEVICE void write_wide(const MatrixParams& p, char* staging, const Target& to,
                                  const float (&total)[C::kRegisters]) {
  constexpr int kTurnTokens = C::kTokens < kWideTokens ? C::kTokens : kWideTokens, kPitch = kWidePitch / 4;
  const int thread = to.thread;
  auto* sums = reinterpret_cast<float*>(staging);
#pragma unroll
  for (int turn = 0; turn < C::kTokens / kTurnTokens; ++turn) {
    consumer_sync(to.consumer);
#pragma unroll
    for (int i = 0; i < kTurnTokens / 2; ++i) {
      sums[hopper::accumulator_col(thread, i) * kPitch + hopper::accumulator_row(thread, i)] =
          total[turn * kTurnTokens / 2 + i];
    }
    consumer_sync(to.consumer);
    const int64_t feature = to.feature + thread % 64;
    if (feature >= p.n) continue;
    const float bias = p.bias == nullptr ? 0.0f : load_number(p.bias, feature, p.bias_type);
#pragma unroll 1
    for (int t = thread / 64; t < kTurnTokens && to.token + turn * kTurnTokens + t < p.m; t += 2) {
      const int64_t place = (to.token + turn * kTurnTokens + t) * p.n + feature;
      float value = fmaf(sums[t * kPitch + thread % 64], to.scales[turn * kTurnTokens + t], bias);
      if (p.residual != nullptr) value += load_number(p.residual, place, p.y_type);
      store_number(p.y, place, p.y_type, value);
    }
  }
}

// --- A segment from its first column to y.

// The first of a consumer's 64-row blocks; there is none where the rows end before.
template <class C>
TILEWRIGHT_DEVICE int first_block_of(const MatrixParams& p, int tile, int consumer) {
  return first_row_block<C>(p, tile) + (C::kTurns ? 0 : consumer * C::kBlocks);
}

template <class C>
TILEWRIGHT_DEVICE void finish_segment(const MatrixParams& p, const Shared<C>& shared, const Segment& segment,
                                      int consumer, float (&totals)[C::kBlocks][C::kRegisters]) {
  const int first = first_block_of<C>(p, segment.tile, consumer);
  const int here = min(C::kBlocks, p.row_blocks - first);
  const bool whole = segment.first == 0 && segment.last == p.work.k_tiles;
  if (!whole && !join<C>(p, shared, segment.tile, consumer, here, totals)) return;
  uint32_t thread[1] = {threadIdx.x % 128};
  hopper::keep(thread);  // what follows from it is worked out here, not kept in registers beside the products
  const int64_t token = static_cast<int64_t>(segment.tile % p.token_tiles) * C::kTokens;
  const float unit = C::kForm == Form::kFold ? 1.0f : static_cast<float>(1 << Int4Hopper::kExponent);
  const float factor = unit * (1.0f / *p.per_tensor_scale);
  float* scales = shared.scales(consumer);
  consumer_sync(consumer);  // those of the tile before are no longer read
  if (thread[0] < C::kTokens) {
    scales[thread[0]] = token + thread[0] < p.m ? p.x_scales[token + thread[0]] * factor : 0.0f;
  }
  char* staging = shared.staging() + (C::kTurns ? 0 : consumer * epilogue_bytes(C::kTokens));
#pragma unroll
  for (int b = 0; b < C::kBlocks; ++b) {
    if (b >= here) continue;
    if (!whole) sum_pieces<C>(p, segment.tile, consumer, b, totals[b]);
    const Target to{static_cast<int>(thread[0]), consumer, scales, token,
                    static_cast<int64_t>(first + b) * Int4Hopper::kRows};
    p.narrow ? write_narrow<C>(p, staging, to, totals[b]) : write_wide<C>(p, staging, to, totals[b]);
  }
}

// Consumers that took turns: the second one's totals go to the first, which has the rest of the work. True for the first.
template <class C>
TILEWRIGHT_DEVICE bool hand_over(const Shared<C>& shared, int consumer, float (&total)[C::kRegisters]) {
  constexpr int kWritten = kHandOverBarrier, kTaken = kHandOverBarrier + 1, kBoth = 128 * kConsumers;
  float* handed = reinterpret_cast<float*>(shared.staging() + epilogue_bytes(C::kTokens)) + threadIdx.x % 128 * 4;
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
  Ring ring;
  for (uint32_t index[1] = {0}; segment_of(p.work, block, static_cast<int>(index[0]), segment); ++index[0]) {
    const int here = p.row_blocks - first_block_of<C>(p, segment.tile, consumer);
    if (here <= 0) {
      pass_segment(p, shared, segment, ring);
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
        multiply_rows<C>(p, shared, segment, ring, totals, consumer, here);
      }
    }
    // Nothing of the segment stays in registers beside the products: it is worked out again.
    hopper::keep(index);
    segment_of(p.work, block, static_cast<int>(index[0]), segment);
    ring.skip(segment.last - segment.first, p.stages);
    if constexpr (C::kTurns) {
      if (!hand_over<C>(shared, consumer, totals[0])) continue;
    }
    if (p.overlap) hopper::wait_for_previous_kernel();
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
    hopper::prefetch(p.x);
    for (int stage = 0; stage < p.stages; ++stage) {
      hopper::init(shared.full(stage), 1);
      hopper::init(shared.empty(stage), C::kReleases);
    }
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
