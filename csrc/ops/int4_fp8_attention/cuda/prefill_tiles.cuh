// SPDX-License-Identifier: Apache-2.0
// Tiles of 64 keys, decoded from the INT4 cache into shared memory by the producer warpgroup: K as e4m3, V as bfloat16.
//
// K is an operand with adjacent elements along the depth, in its natural order. V is one with adjacent elements along
// the head (no transpose); within each 8 elements it lies in the order 0 4 1 5 2 6 3 7, in which pairs come out of a
// word of codes, and the output is written back in the natural one.
#pragma once

#include "ops/int4_fp8_attention/cuda/codes.cuh"
#include "ops/int4_fp8_attention/cuda/rows.cuh"

namespace tilewright::int4_fp8_attention::cuda {

using hopper::e4m3;
using hopper::Swizzle;

inline constexpr int kProducers = 128;
inline constexpr int kConsumerGroups = 2;
inline constexpr int kPrefillThreads = kProducers * (1 + kConsumerGroups);
inline constexpr int kStages = 4;  // a power of two
inline constexpr int kCodesPerVector = 32;  // in 16 bytes

template <int D>
struct PrefillShared {
  using KeyTile = hopper::Tile<e4m3, kPrefillKeys, D, D == 64 ? Swizzle::k64 : Swizzle::k128>;
  using ValueTile = hopper::Tile<bf16, kPrefillKeys, D, Swizzle::k128>;
  static constexpr int kPitch = D + 4;  // of a row of the output: its columns then lie in different banks

  alignas(1024) char keys[kStages][KeyTile::kBytes];
  alignas(1024) char values[kStages][ValueTile::kBytes];
  float key_scales[kStages][kPrefillKeys], value_scales[kStages][kPrefillKeys];
  float out[kPrefillRows][kPitch];
  hopper::Barrier full[kStages], empty[kStages];
};

// Which codes a thread decodes: vector i is 32 codes of one row. Eight neighbouring threads have eight rows, so that
// their stores to swizzled rows touch every bank once; a warp still reads whole rows.
template <int D>
struct VectorPlace {
  int row, col;

  TILEWRIGHT_DEVICE static VectorPlace of(int thread, int i) {
    constexpr int kVectorsPerRow = D / kCodesPerVector;
    const int unit = i * kProducers + thread, rest = unit / 8;
    return {rest / kVectorsPerRow * 8 + unit % 8, rest % kVectorsPerRow * kCodesPerVector};
  }
};

// The keys that a block of rows sees: addresses of the first, which is key 0 of tile 0.
struct PrefillSource {
  const uint8_t *k, *v, *k_scales, *v_scales;
  int64_t stride, scale_stride;  // bytes from token to token
  int row_bytes;
  bool wide_scales;  // float32, not bfloat16
  int begin, end;  // keys that may be read
  int tiles;
};

// A thread's share of a tile, as it is stored.
template <int D>
struct RawTile {
  static constexpr int kVectors = kPrefillKeys * D / kCodesPerVector / kProducers;
  U128 k[kVectors], v[kVectors];
  uint32_t scale;  // threads 0-63: of the keys, 64-127: of the values

  TILEWRIGHT_DEVICE void load(const PrefillSource& from, int tile, int thread) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto place = VectorPlace<D>::of(thread, i);
      const int key = tile * kPrefillKeys + place.row, offset = place.col / 2;
      k[i] = v[i] = U128{0, 0, 0, 0};
      if (key < from.begin || key >= from.end || offset >= from.row_bytes) continue;
      k[i] = hopper::load_16(from.k + key * from.stride + offset);
      v[i] = hopper::load_16(from.v + key * from.stride + offset);
    }
    const int key = tile * kPrefillKeys + thread % kPrefillKeys;
    const uint8_t* at = (thread < kPrefillKeys ? from.k_scales : from.v_scales) + key * from.scale_stride;
    scale = 0;
    if (key < from.begin || key >= from.end) return;
    scale = from.wide_scales ? *reinterpret_cast<const uint32_t*>(at) : *reinterpret_cast<const uint16_t*>(at);
  }

  TILEWRIGHT_DEVICE void store(PrefillShared<D>& shared, const PrefillSource& from, int stage, int thread) const {
    using Shared = PrefillShared<D>;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto place = VectorPlace<D>::of(thread, i);
      const uint32_t key_words[4] = {k[i].x, k[i].y, k[i].z, k[i].w};
      const uint32_t value_words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
        U128 bytes;
        decode_e4m3(key_words[w], bytes.x, bytes.y);
        decode_e4m3(key_words[w + 1], bytes.z, bytes.w);
        hopper::store_16(Shared::KeyTile::at(shared.keys[stage], place.row, place.col + 8 * w), bytes);
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        hopper::store_16(Shared::ValueTile::at(shared.values[stage], place.row, place.col + 8 * w),
                         decode_bf16(value_words[w]));
      }
    }
    float* scales = thread < kPrefillKeys ? shared.key_scales[stage] : shared.value_scales[stage];
    scales[thread % kPrefillKeys] = hopper::bits_float(from.wide_scales ? scale : scale << 16);
  }
};

// Stage and phase of a block's n-th tile in a ring of kStages; the tiles of its items count on.
TILEWRIGHT_DEVICE int stage_of(int n) { return n % kStages; }
TILEWRIGHT_DEVICE uint32_t phase_of(int n) { return static_cast<uint32_t>(n / kStages) % 2; }

// The producer warpgroup, for one item whose first tile is the block's n-th. The next tile's codes come from memory
// while the thread waits for a free stage, which is most of the time.
template <int D>
TILEWRIGHT_DEVICE void produce(PrefillShared<D>& shared, const PrefillSource& from, int n) {
  const int thread = static_cast<int>(threadIdx.x) % kProducers;
  RawTile<D> raw;
  raw.load(from, 0, thread);
  for (int j = 0; j < from.tiles; ++j, ++n) {
    if (n >= kStages) hopper::wait(shared.empty[stage_of(n)], phase_of(n - kStages));
    raw.store(shared, from, stage_of(n), thread);
    hopper::fence_async_shared();
    hopper::arrive(shared.full[stage_of(n)]);
    raw.load(from, j + 1, thread);
  }
}

}  // namespace tilewright::int4_fp8_attention::cuda
