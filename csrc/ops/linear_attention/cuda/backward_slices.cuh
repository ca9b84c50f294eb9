// SPDX-License-Identifier: Apache-2.0
// What a slice of 64 columns of V adds to a chunk's gradients: read by two warpgroups, each for half of the key's channels.
#pragma once

#include "ops/linear_attention/cuda/backward_tiles.cuh"

namespace tilewright::linear_attention::cuda::backward {

inline constexpr int kCollectGroups = 2;
inline constexpr int kCollectStages = 2;

template <class T, int kKey>
struct SliceShared {
  using All = Tiles<T, kKey>;
  static constexpr int kDOut = 0;
  static constexpr int kErrors = kDOut + All::Values::kBytes;
  static constexpr int kDErrors = kErrors + All::Values::kBytes;
  static constexpr int kState = kDErrors + All::Values::kBytes;
  static constexpr int kDState = kState + All::State::kBytes;
  static constexpr int kFactors = kDState + All::State::kBytes;
  static constexpr int kSliceBytes = kFactors + kFactorBytes;
  static_assert(kSliceBytes % 1024 == 0, "tiles start at multiples of 1024 bytes");
};

template <class T, int kKey, bool kDelta>
TILEWRIGHT_DEVICE void load_slice(const Params& params, const Chunk& chunk, int64_t place, int head, int slice,
                                  char* to, Barrier& full) {
  using Shared = SliceShared<T, kKey>;
  using All = Tiles<T, kKey>;
  const ChunkBackward& p = params.p;
  const int64_t pair = pair_of(p, place, head);
  hopper::arrive_expect(full, 3 * All::Values::kBytes + 2 * All::State::kBytes + kFactorBytes);
  load_rows<typename All::Values>(to + Shared::kDOut, params.d_out, full, slice * kSlice, head, chunk.first,
                                  chunk.batch);
  if constexpr (kDelta) {
    hopper::load_bulk(to + Shared::kErrors, slice_of(p, p.errors, pair, slice, kSlice), All::Values::kBytes, full);
  } else {
    load_rows<typename All::Values>(to + Shared::kErrors, params.v, full, slice * kSlice, head, chunk.first,
                                    chunk.batch);
  }
  hopper::load_bulk(to + Shared::kDErrors, slice_of(p, p.d_errors, pair, slice, kSlice), All::Values::kBytes, full);
  hopper::load_bulk(to + Shared::kState, slice_of(p, p.states, pair, slice, kKey), All::State::kBytes, full);
  hopper::load_bulk(to + Shared::kDState, slice_of(p, p.d_states, pair, slice, kKey), All::State::kBytes, full);
  hopper::load_bulk(to + Shared::kFactors, factors_of(p.factors, pair), kFactorBytes, full);
}

// What a warpgroup holds: 64 tokens by half of the channels.
template <int kKey>
struct Sums {
  static constexpr int kColumns = kKey / kCollectGroups;

  float dq[kColumns / 2], dk_read[kColumns / 2], dk_write[kColumns / 2];
  float pairs[kChunk / 2];  // of the first group dO W^T, of the second dY W^T
};

template <class T>
TILEWRIGHT_DEVICE uint32_t times(float factor, uint32_t pair) {
  float low, high;
  hopper::unpack_pair<T>(pair, low, high);
  return hopper::pack_pair<T>(factor * low, factor * high);
}

template <class T>
TILEWRIGHT_DEVICE hopper::U128 times(float factor, const hopper::U128& words) {
  return {times<T>(factor, words.x), times<T>(factor, words.y), times<T>(factor, words.z), times<T>(factor, words.w)};
}

// A tile of tokens as the register operand, each row times a factor: rows r and r + 8 of a thread.
template <class T, int kKey>
TILEWRIGHT_DEVICE void scale_rows(char* tile, int thread, const float (&factors)[2], uint32_t (&a)[kSlice / 16][4]) {
#pragma unroll
  for (int step = 0; step < kSlice / 16; ++step) {
    hopper::ldmatrix_x4(a[step], along<typename Tiles<T, kKey>::Values>(tile, thread, step));
#pragma unroll
    for (int j = 0; j < 4; ++j) a[step][j] = times<T>(factors[j % 2], a[step][j]);
  }
}

// d += rows S, both of a slice.
template <class T, int kKey>
TILEWRIGHT_DEVICE void add_through_state(const uint32_t (&rows)[kSlice / 16][4], char* state, int group,
                                         float (&d)[Sums<kKey>::kColumns / 2]) {
  using State = typename Tiles<T, kKey>::State;
  constexpr int kColumns = Sums<kKey>::kColumns;
#pragma unroll
  for (int step = 0; step < kSlice / 16; ++step) {
    hopper::Wgmma<T, T, kColumns, hopper::Major::kK, hopper::Major::kMN>::run(
        d, rows[step], State::mn_major(state, 16 * step, group * kColumns), true);
  }
}

template <class T, int kKey>
TILEWRIGHT_DEVICE void add_pairs(char* left, char* errors, bool accumulate, float (&d)[kChunk / 2]) {
  using Values = typename Tiles<T, kKey>::Values;
#pragma unroll
  for (int step = 0; step < kSlice / 16; ++step) {
    hopper::Wgmma<T, T, kChunk>::run(d, Values::k_major(left, 0, 16 * step), Values::k_major(errors, 0, 16 * step),
                                     accumulate || step > 0);
  }
}

// What a slice adds to the sums: its part of E or N, and what goes through the states.
template <class T, int kKey, bool kDelta, class F>
TILEWRIGHT_DEVICE void add_slice(float scale, char* slice, int group, int thread, bool first, Sums<kKey>& sums) {
  using Shared = SliceShared<T, kKey>;
  const F f{reinterpret_cast<const float*>(slice + Shared::kFactors)};
  const int row = hopper::accumulator_row(thread, 0);
  const float read[2] = {scale * f.into(row), scale * f.into(row + 8)};
  const float error[2] = {-f.into(row) * f.beta(row), -f.into(row + 8) * f.beta(row + 8)};
  const float write[2] = {f.onto(row) * f.beta(row), f.onto(row + 8) * f.beta(row + 8)};
  // Two sets of registers for three operands: the third one waits for the first one's product.
  uint32_t a[kSlice / 16][4], errors[kSlice / 16][4];
  scale_rows<T, kKey>(slice + Shared::kDOut, thread, read, a);
  hopper::wgmma_fence();
  // Without N the second group makes E too, for nothing: its tensor cores wait for the first one anyway.
  add_pairs<T, kKey>(slice + (kDelta && group == 1 ? Shared::kDErrors : Shared::kDOut), slice + Shared::kErrors, !first,
                     sums.pairs);
  add_through_state<T, kKey>(a, slice + Shared::kState, group, sums.dq);
  hopper::wgmma_commit();
  scale_rows<T, kKey>(slice + Shared::kErrors, thread, write, errors);
  hopper::wgmma_fence();
  add_through_state<T, kKey>(errors, slice + Shared::kDState, group, sums.dk_write);
  hopper::wgmma_commit();
  if constexpr (kDelta) {
    hopper::wgmma_wait<1>();
    scale_rows<T, kKey>(slice + Shared::kDErrors, thread, error, a);
    hopper::wgmma_fence();
    add_through_state<T, kKey>(a, slice + Shared::kState, group, sums.dk_read);
    hopper::wgmma_commit();
  }
}

// dV = D dY of a slice; the additive rule's dV as it is.
template <class T, int kKey, bool kDelta>
TILEWRIGHT_DEVICE void store_d_values(const ChunkBackward& p, const Chunk& chunk, int head, int slice, char* from) {
  using Shared = SliceShared<T, kKey>;
  using Values = typename Tiles<T, kKey>::Values;
  const Factors f{reinterpret_cast<const float*>(from + Shared::kFactors)};
  constexpr unsigned kPerRow = kSlice / 8;
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(chunk.rows) * kPerRow; i += kCollectGroups * kGroup) {
    const int row = static_cast<int>(i / kPerRow), column = static_cast<int>(i % kPerRow * 8);
    if (slice * kSlice + column >= p.value_size) continue;
    hopper::U128 words = hopper::load_16(from + Shared::kDErrors + Values::offset(row, column));
    if constexpr (kDelta) words = times<T>(f.beta(row), words);
    const int64_t token = (chunk.batch * p.sequences.tokens + chunk.first + row) * p.value_heads + head;
    hopper::store_16(p.dv + token * p.value_size + slice * kSlice + column, words);
  }
}

// E of the first group and N of the second, as operands; the second also has dbeta, on the diagonal.
template <class T, int kKey, bool kDelta, class F>
TILEWRIGHT_DEVICE void store_pairs(const ChunkBackward& p, const Chunk& chunk, int head, const F& f, int group,
                                   int thread, float (&d)[kChunk / 2], char* tile) {
#pragma unroll
  for (int r = 0; r < kChunk / 2; ++r) {
    const int i = hopper::accumulator_row(thread, r), j = hopper::accumulator_col(thread, r);
    if (kDelta && group == 1 && i == j && i < chunk.rows) {
      p.d_beta[(chunk.batch * p.sequences.tokens + chunk.first + i) * p.value_heads + head] = d[r];
    }
    const bool inside = i < chunk.rows && (group == 0 ? j <= i : j < i);
    const float factor = (group == 0 ? p.scale : -f.beta(i)) * f.beta(j);
    d[r] = inside ? factor * d[r] * exp2f(f.log(i) - f.log(j)) : 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    uint32_t words[4];
    fragment<T>(d, step, words);
    hopper::stmatrix_x4(along<typename Tiles<T, kKey>::Pairs>(tile, thread, step), words);
  }
}

}  // namespace tilewright::linear_attention::cuda::backward
