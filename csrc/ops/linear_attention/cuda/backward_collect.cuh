// SPDX-License-Identifier: Apache-2.0
// Every chunk of a key head, its value heads one after the other: dq, dk summed over them, dv, dbeta and dg.
//
//   E = scale (dO W^T) D, N = -D (dY W^T) D                     masked, decays included; dbeta is the diagonal of dY W^T
//   dQ       = E K + diag(scale into) dO S^T
//   dK_read  = N K - diag(into beta) dY S^T
//   dK_write = E^T Q + N^T K + diag(onto beta) W dS^T
//   dg_t     = sum over s >= t of (q dQ + k dK_read - k dK_write)_s + <dS, S behind the chunk>
//   <dS, S behind> = whole <dS, S> + sum of k o (diag(onto beta) W dS^T)
//
// A block has two warpgroups, each with half of the key's channels, and a third that loads; it stays and takes chunks in
// turn, so that the loads of the next slice, head and chunk are always under way: what bounds this kernel is memory.
#pragma once

#include "ops/linear_attention/cuda/backward_slices.cuh"

namespace tilewright::linear_attention::cuda::backward {

// A third warpgroup, of which one thread loads: registers are given away by warpgroups.
inline constexpr int kCollectThreads = (kCollectGroups + 1) * kGroup;
inline constexpr int kCollectRegisters = 232, kLoaderRegisters = 40;

struct CollectRing {
  Barrier keys_full[kCollectStages], keys_empty[kCollectStages], full[kCollectStages], empty[kCollectStages];

  TILEWRIGHT_DEVICE void start() {
    constexpr int kWarps = kCollectGroups * kGroup / 32;
    for (int i = 0; i < kCollectStages; ++i) {
      hopper::init(keys_full[i], 1);
      hopper::init(keys_empty[i], kWarps);
      hopper::init(full[i], 1);
      hopper::init(empty[i], kWarps);
    }
    hopper::fence_barrier_init();
  }
};

template <class T, int kKey>
struct CollectShared : SliceShared<T, kKey> {
  using All = Tiles<T, kKey>;
  // Of a chunk.
  static constexpr int kKeys = 0;
  static constexpr int kQueries = kKeys + All::Keys::kBytes;
  static constexpr int kKeysBytes = kQueries + All::Keys::kBytes;
  // The block.
  static constexpr int kSlices = kCollectStages * kKeysBytes;
  static constexpr int kOutputPairs = kSlices + kCollectStages * SliceShared<T, kKey>::kSliceBytes;  // E
  static constexpr int kKeyPairs = kOutputPairs + All::Pairs::kBytes;  // N
  static constexpr int kKeptFactors = kKeyPairs + All::Pairs::kBytes;
  static constexpr int kTerms = kKeptFactors + kFactorBytes;  // of dg, by group and token
  static constexpr int kAnchors = kTerms + kCollectGroups * kChunk * 4;  // by warp
  static constexpr int kRing = kAnchors + kCollectGroups * kGroup / 32 * 4;
  static constexpr int kBytes = kRing + static_cast<int>(sizeof(CollectRing));
  static_assert(kBytes <= hopper::kMaxSharedBytes, "the stages do not fit");
};

TILEWRIGHT_DEVICE int64_t units_of(const ChunkBackward& p) { return p.places() * p.heads; }

template <class T, int kKey, bool kDelta>
TILEWRIGHT_DEVICE void load_chunks(const Params& params, char* shared, CollectRing& ring) {
  using Shared = CollectShared<T, kKey>;
  using Keys = typename Tiles<T, kKey>::Keys;
  const ChunkBackward& p = params.p;
  const int group = p.value_heads / p.heads;
  hopper::PipelineState<kCollectStages> keys, slices;
  for (int64_t unit = blockIdx.x; unit < units_of(p); unit += gridDim.x) {
    const int64_t place = unit / p.heads;
    const int key_head = static_cast<int>(unit % p.heads);
    const Chunk chunk = chunk_at(p.sequences, place);
    if (chunk.rows == 0) continue;
    char* to = shared + keys.stage * Shared::kKeysBytes;
    hopper::wait(ring.keys_empty[keys.stage], keys.phase ^ 1);
    hopper::arrive_expect(ring.keys_full[keys.stage], 2 * Keys::kBytes);
    load_rows<Keys>(to + Shared::kKeys, params.k, ring.keys_full[keys.stage], 0, key_head, chunk.first, chunk.batch);
    load_rows<Keys>(to + Shared::kQueries, params.q, ring.keys_full[keys.stage], 0, key_head, chunk.first, chunk.batch);
    keys.advance();
    for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
      for (int slice = 0; slice < p.slices(); ++slice, slices.advance()) {
        hopper::wait(ring.empty[slices.stage], slices.phase ^ 1);
        load_slice<T, kKey, kDelta>(params, chunk, place, head, slice,
                                    shared + Shared::kSlices + slices.stage * Shared::kSliceBytes,
                                    ring.full[slices.stage]);
      }
    }
  }
}

// This thread's part of <dS, S> of a slice.
template <class T, int kKey>
TILEWRIGHT_DEVICE float state_product(const char* slice) {
  using Shared = CollectShared<T, kKey>;
  constexpr int kBytes = Tiles<T, kKey>::State::kBytes;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kBytes / (16 * kCollectGroups * kGroup); ++i) {
    const int at = 16 * (static_cast<int>(threadIdx.x) + i * kCollectGroups * kGroup);
    const hopper::U128 a = hopper::load_16(slice + Shared::kState + at);
    const hopper::U128 b = hopper::load_16(slice + Shared::kDState + at);
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float low, high, d_low, d_high;
      hopper::unpack_pair<T>(left[j], low, high);
      hopper::unpack_pair<T>(right[j], d_low, d_high);
      sum += low * d_low + high * d_high;
    }
  }
  return sum;
}

// d += pairs rows, or pairs^T rows.
template <class T, int kKey, bool kTransposed>
TILEWRIGHT_DEVICE void add_through_pairs(char* pairs, char* rows, int group, float (&d)[Sums<kKey>::kColumns / 2]) {
  using All = Tiles<T, kKey>;
  constexpr int kColumns = Sums<kKey>::kColumns;
  constexpr hopper::Major kLeft = kTransposed ? hopper::Major::kMN : hopper::Major::kK;
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    const hopper::Descriptor left =
        kTransposed ? All::Pairs::mn_major(pairs, 16 * step, 0) : All::Pairs::k_major(pairs, 0, 16 * step);
    hopper::Wgmma<T, T, kColumns, kLeft, hopper::Major::kMN>::run(
        d, left, All::Keys::mn_major(rows, 16 * step, group * kColumns), true);
  }
}

template <class T, int kKey, bool kDelta>
TILEWRIGHT_DEVICE void add_chunk(char* shared, char* keys, int group, Sums<kKey>& sums) {
  using Shared = CollectShared<T, kKey>;
  char* output_pairs = shared + Shared::kOutputPairs;
  char* key_pairs = shared + Shared::kKeyPairs;
  hopper::keep(sums.dq);
  hopper::keep(sums.dk_read);
  hopper::keep(sums.dk_write);
  hopper::wgmma_fence();
  add_through_pairs<T, kKey, false>(output_pairs, keys + Shared::kKeys, group, sums.dq);
  add_through_pairs<T, kKey, true>(output_pairs, keys + Shared::kQueries, group, sums.dk_write);
  if constexpr (kDelta) {
    add_through_pairs<T, kKey, false>(key_pairs, keys + Shared::kKeys, group, sums.dk_read);
    add_through_pairs<T, kKey, true>(key_pairs, keys + Shared::kKeys, group, sums.dk_write);
  }
  hopper::wgmma_commit();
  hopper::wgmma_wait<0>();
  hopper::keep(sums.dq);
  hopper::keep(sums.dk_read);
  hopper::keep(sums.dk_write);
}

// Adds factor rows o d to the sums of this thread's two tokens.
template <class T, int kKey>
TILEWRIGHT_DEVICE void add_row_products(const char* rows, int group, int thread, float factor,
                                        const float (&d)[Sums<kKey>::kColumns / 2], float (&sums)[2]) {
  using Keys = typename Tiles<T, kKey>::Keys;
#pragma unroll
  for (int r = 0; r < Sums<kKey>::kColumns / 2; r += 2) {
    const int i = hopper::accumulator_row(thread, r), j = hopper::accumulator_col(thread, r);
    float low, high;
    hopper::unpack_pair<T>(*reinterpret_cast<const uint32_t*>(rows + Keys::offset(i, group * Sums<kKey>::kColumns + j)),
                           low, high);
    sums[r / 2 % 2] += factor * (low * d[r] + high * d[r + 1]);
  }
}

TILEWRIGHT_DEVICE float over_quad(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

TILEWRIGHT_DEVICE float over_warp(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// dg of a chunk: what later tokens and the state behind it know of a token's decay. One warp, two tokens a lane.
TILEWRIGHT_DEVICE void store_d_decay(const ChunkBackward& p, const Chunk& chunk, int head, const float* terms,
                                     const float* anchors) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float anchor = 0.0f;
  for (int warp = 0; warp < kCollectGroups * kGroup / 32; ++warp) anchor += anchors[warp];
  float low = terms[lane] + terms[kChunk + lane], high = terms[lane + 32] + terms[kChunk + lane + 32];
  for (int step = 1; step < 32; step *= 2) {
    const float next_low = __shfl_down_sync(0xffffffffu, low, step);
    const float next_high = __shfl_down_sync(0xffffffffu, high, step);
    if (lane + step < 32) {
      low += next_low;
      high += next_high;
    }
  }
  low += __shfl_sync(0xffffffffu, high, 0);
  float* to = p.dg + (chunk.batch * p.sequences.tokens + chunk.first) * p.value_heads + head;
  if (lane < chunk.rows) to[static_cast<int64_t>(lane) * p.value_heads] = low + anchor;
  if (lane + 32 < chunk.rows) to[static_cast<int64_t>(lane + 32) * p.value_heads] = high + anchor;
}

// This warpgroup's channels of dq or dk.
template <class T, int kKey>
TILEWRIGHT_DEVICE void store_d_keys(const ChunkBackward& p, const Chunk& chunk, int key_head, int group, int thread,
                                    const float (&d)[Sums<kKey>::kColumns / 2], uint16_t* to) {
#pragma unroll
  for (int r = 0; r < Sums<kKey>::kColumns / 2; r += 2) {
    const int i = hopper::accumulator_row(thread, r);
    const int column = group * Sums<kKey>::kColumns + hopper::accumulator_col(thread, r);
    if (i >= chunk.rows || column >= p.key_size) continue;
    const int64_t token = (chunk.batch * p.sequences.tokens + chunk.first + i) * p.heads + key_head;
    *reinterpret_cast<uint32_t*>(to + token * p.key_size + column) = hopper::pack_pair<T>(d[r], d[r + 1]);
  }
}

TILEWRIGHT_DEVICE void meet() { hopper::named_sync(1, kCollectGroups * kGroup); }

template <class T, int kKey, bool kDelta>
class Collector {
  using Shared = CollectShared<T, kKey>;
  using All = Tiles<T, kKey>;

 public:
  TILEWRIGHT_DEVICE Collector(const ChunkBackward& p, char* shared, CollectRing& ring)
      : p_(p), shared_(shared), ring_(ring) {}

  TILEWRIGHT_DEVICE void run() {
    const int heads = p_.value_heads / p_.heads;
    for (int64_t unit = blockIdx.x; unit < units_of(p_); unit += gridDim.x) {
      const int key_head = static_cast<int>(unit % p_.heads);
      const Chunk chunk = chunk_at(p_.sequences, unit / p_.heads);
      if (chunk.rows == 0) continue;
      char* keys = shared_ + keys_.stage * Shared::kKeysBytes;
      hopper::wait(ring_.keys_full[keys_.stage], keys_.phase);
      if (chunk.rows < kChunk) {
        clear_rows<typename All::Keys>(keys + Shared::kKeys, chunk.rows, thread(), kCollectGroups * kGroup);
        clear_rows<typename All::Keys>(keys + Shared::kQueries, chunk.rows, thread(), kCollectGroups * kGroup);
      }
      Sums<kKey> sums;
#pragma unroll
      for (int i = 0; i < Sums<kKey>::kColumns / 2; ++i) sums.dq[i] = sums.dk_read[i] = sums.dk_write[i] = 0.0f;
      float before[2] = {0.0f, 0.0f}, written[2] = {0.0f, 0.0f};
      for (int head = key_head * heads; head < (key_head + 1) * heads; ++head) {
        add_head(chunk, head, keys, sums, before, written);
      }
#pragma unroll
      for (int i = 0; i < Sums<kKey>::kColumns / 2; ++i) sums.dk_write[i] += sums.dk_read[i];
      store_d_keys<T, kKey>(p_, chunk, key_head, group(), thread(), sums.dq, p_.dq);
      store_d_keys<T, kKey>(p_, chunk, key_head, group(), thread(), sums.dk_write, p_.dk);
      release(ring_.keys_empty[keys_.stage]);
      keys_.advance();
    }
  }

 private:
  static TILEWRIGHT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
  static TILEWRIGHT_DEVICE int group() { return static_cast<int>(threadIdx.x) / kGroup; }
  static TILEWRIGHT_DEVICE int in_group() { return fresh_thread() % kGroup; }

  // before and written: this thread's sums of dg's terms and of k o dK_write over the heads up to here.
  TILEWRIGHT_DEVICE void add_head(const Chunk& chunk, int head, char* keys, Sums<kKey>& sums, float (&before)[2],
                                  float (&written)[2]) {
    const float product = add_slices(chunk, head, sums);
    const Factors f{reinterpret_cast<const float*>(shared_ + Shared::kKeptFactors)};
    meet();  // factors are there, and nobody reads the last head's E and N
    float anchor = f.whole() * product;
    if (p_.decay != Decay::kNone) anchor += d_written(keys, sums, written);
    if (kDelta || group() == 0) {
      store_pairs<T, kKey, kDelta>(p_, chunk, head, f, group(), in_group(), sums.pairs,
                                   shared_ + (group() == 0 ? Shared::kOutputPairs : Shared::kKeyPairs));
    }
    hopper::fence_async_shared();
    meet();
    add_chunk<T, kKey, kDelta>(shared_, keys, group(), sums);
    if (p_.decay != Decay::kNone) store_decay(chunk, head, keys, sums, anchor, before, written);
  }

  // Returns this thread's part of <dS, S>.
  TILEWRIGHT_DEVICE float add_slices(const Chunk& chunk, int head, Sums<kKey>& sums) {
    float product = 0.0f;
    for (int slice = 0; slice < p_.slices(); ++slice, slices_.advance()) {
      char* from = shared_ + Shared::kSlices + slices_.stage * Shared::kSliceBytes;
      hopper::wait(ring_.full[slices_.stage], slices_.phase);
      if (chunk.rows < kChunk) clear_tails(from, chunk.rows);
      if (slice == 0) keep_factors(from);
      hopper::keep(sums.dq);
      hopper::keep(sums.dk_read);
      hopper::keep(sums.dk_write);
      store_d_values<T, kKey, kDelta>(p_, chunk, head, slice, from);
      if (p_.decay != Decay::kNone) product += state_product<T, kKey>(from);
      add_slice<T, kKey, kDelta, Factors>(p_.scale, from, group(), in_group(), slice == 0, sums);
      hopper::wgmma_wait<0>();
      hopper::keep(sums.dq);
      hopper::keep(sums.dk_read);
      hopper::keep(sums.dk_write);
      hopper::keep(sums.pairs);
      release(ring_.empty[slices_.stage]);
    }
    return product;
  }

  // In a packed batch the rows behind a sequence are the next one's.
  TILEWRIGHT_DEVICE void clear_tails(char* slice, int rows) {
    clear_rows<typename All::Values>(slice + Shared::kDOut, rows, thread(), kCollectGroups * kGroup);
    if constexpr (!kDelta) {
      clear_rows<typename All::Values>(slice + Shared::kErrors, rows, thread(), kCollectGroups * kGroup);
    }
    hopper::fence_async_shared();
    meet();
  }

  TILEWRIGHT_DEVICE void keep_factors(const char* slice) {
    const auto* from = reinterpret_cast<const float*>(slice + Shared::kFactors);
    reinterpret_cast<float*>(shared_ + Shared::kKeptFactors)[thread()] = from[thread()];
  }

  // What this head's states add to k o dK_write.
  TILEWRIGHT_DEVICE float d_written(const char* keys, const Sums<kKey>& sums, const float (&written)[2]) {
    float now[2] = {0.0f, 0.0f};
    add_row_products<T, kKey>(keys + Shared::kKeys, group(), in_group(), 1.0f, sums.dk_write, now);
    return (now[0] - written[0]) + (now[1] - written[1]);
  }

  TILEWRIGHT_DEVICE void store_decay(const Chunk& chunk, int head, const char* keys, const Sums<kKey>& sums,
                                     float anchor, float (&before)[2], float (&written)[2]) {
    auto* terms = reinterpret_cast<float*>(shared_ + Shared::kTerms);
    auto* anchors = reinterpret_cast<float*>(shared_ + Shared::kAnchors);
    written[0] = written[1] = 0.0f;
    add_row_products<T, kKey>(keys + Shared::kKeys, group(), in_group(), 1.0f, sums.dk_write, written);
    float now[2] = {-written[0], -written[1]};
    add_row_products<T, kKey>(keys + Shared::kQueries, group(), in_group(), 1.0f, sums.dq, now);
    if constexpr (kDelta) {
      add_row_products<T, kKey>(keys + Shared::kKeys, group(), in_group(), 1.0f, sums.dk_read, now);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float term = over_quad(now[r] - before[r]);
      if (thread() % 4 == 0) terms[group() * kChunk + hopper::accumulator_row(in_group(), 2 * r)] = term;
      before[r] = now[r];
    }
    anchor = over_warp(anchor);
    if (thread() % 32 == 0) anchors[thread() / 32] = anchor;
    meet();
    if (thread() < 32) store_d_decay(p_, chunk, head, terms, anchors);
  }

  const ChunkBackward& p_;
  char* shared_;
  CollectRing& ring_;
  hopper::PipelineState<kCollectStages> keys_, slices_;
};

template <class T, int kKey, bool kDelta>
__global__ void __launch_bounds__(kCollectThreads, 1) collect_kernel(const __grid_constant__ Params params) {
  using Shared = CollectShared<T, kKey>;
  char* shared = hopper::shared_memory();
  auto& ring = *reinterpret_cast<CollectRing*>(shared + Shared::kRing);
  if (threadIdx.x == 0) ring.start();
  __syncthreads();
  if (threadIdx.x >= kCollectGroups * kGroup) {
    hopper::lower_registers<kLoaderRegisters>();
    if (threadIdx.x == kCollectGroups * kGroup) load_chunks<T, kKey, kDelta>(params, shared, ring);
  } else {
    hopper::raise_registers<kCollectRegisters>();
    Collector<T, kKey, kDelta>(params.p, shared, ring).run();
  }
}

}  // namespace tilewright::linear_attention::cuda::backward
