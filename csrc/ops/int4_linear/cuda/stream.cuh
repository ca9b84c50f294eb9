// SPDX-License-Identifier: Apache-2.0
// Few tokens, bound by reading the weights: signed codes with one scale of 16 bits a row and chunk.
//
// A warp takes a unit at a time, 16 rows by 128 columns, its threads' parts of the 16-row operand of a warp's product, and
// has kAhead of them on the way, each lane to a place of its own in shared memory: in registers they would wait for each
// other, for a warp can tell six loads apart. Units of a block, panel after panel, are dealt out to its warps in equal runs, so
// that none waits for another before the end; where a panel's run goes from warp to warp, each leaves its sums in a slot.
// Tokens lie in shared memory in the order in which a lane takes them. With many columns or tokens the blocks of a cluster
// share their panels' columns, so that less of the tokens comes to each. All sums are added in the order of K. The kernel
// starts while the one before it ends, and where that is the one that rounds the tokens, weights are on their way before it
// has ended.
//
// Hopper has no FP8 product for a warp, so codes and tokens become 16-bit floats, both exactly: a half whose bits 8 to 10 are
// a magnitude, the others but the sign zero, is that number times 2^-16.
#pragma once

#include "hopper/hopper.h"
#include "ops/int4_linear/cuda/launch.h"
#include "ops/int4_linear/cuda/numbers.cuh"

namespace tilewright::int4_linear::stream {

struct Params {
  Cut cut;
  const uint8_t* chunks;
  const float* per_tensor_scale;
  const uint8_t* codes;  // [M, padded_k]
  const float* x_scales;
  const void* bias;
  const void* residual;  // null, or [M, N] of y_type, added
  void* y;
  int64_t m, n, padded_k;
  int chunk_bytes;
  format::ScaleType scale_type;
  Number bias_type, y_type;
  bool weights_first;
};

using Chunk = format::Int4Hopper;
inline constexpr int kSteps = Chunk::kCols / 32;  // of a unit
inline constexpr int kFragmentBytes = 32 * 16;  // of 8 tokens by 32 columns in shared memory
static_assert(kSteps * kFragmentBytes == kTileBytes);

// A block's panels and tiles.
struct Part {
  int rank, first_panel, panels, first_tile, tiles;

  TILEWRIGHT_DEVICE explicit Part(const Cut& cut) {
    const int cluster = static_cast<int>(blockIdx.x) / cut.splits;
    rank = static_cast<int>(blockIdx.x) % cut.splits;
    first_panel = share_of(cut.panels, cluster, cut.clusters);
    panels = share_of(cut.panels, cluster + 1, cut.clusters) - first_panel;
    first_tile = share_of(cut.tiles, rank, cut.splits);
    tiles = share_of(cut.tiles, rank + 1, cut.splits) - first_tile;
  }
  TILEWRIGHT_DEVICE int units() const { return panels * tiles; }
  TILEWRIGHT_DEVICE int first_unit(int warp) const { return share_of(units(), warp, kWarps); }
  // The warp whose run holds a unit.
  TILEWRIGHT_DEVICE int warp_of(int unit) const { return ((unit + 1) * kWarps - 1) / units(); }
};

// A lane's part of a unit.
struct Unit {
  hopper::U128 codes[2];
  uint32_t scales;  // of the rows r and r + 8
};

// Where units come from, one after the other along K.
struct Place {
  const uint8_t* codes;  // this lane's
  const uint8_t* scales;

  TILEWRIGHT_DEVICE void seek(const Params& p, int panel, int tile) {
    constexpr int kPanelsOfChunk = Chunk::kRows / kPanelRows;
    const int lane = static_cast<int>(threadIdx.x) % 32, place = panel % kPanelsOfChunk;
    const uint8_t* chunk =
        p.chunks + (static_cast<int64_t>(panel / kPanelsOfChunk) * p.cut.tiles + tile) * p.chunk_bytes;
    codes = chunk + Chunk::word_offset(kPanelRows * place, 0, 0) + lane * 16;
    scales = chunk + Chunk::kCodeBytes + Chunk::row_order(kPanelRows * place + lane / 4) * 2;
  }
  TILEWRIGHT_DEVICE void copy(const Params& p, char* to) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    hopper::copy_async_16(to + lane * 16, codes);
    hopper::copy_async_16(to + 512 + lane * 16, codes + Chunk::kThreads * 16);
    hopper::copy_async_4(to + 1024 + lane * 4, scales);
    codes += p.chunk_bytes;
    scales += p.chunk_bytes;
  }
};

// What came, of this lane.
TILEWRIGHT_DEVICE Unit load_unit(const char* from) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return {{hopper::load_16(from + lane * 16), hopper::load_16(from + 512 + lane * 16)},
          *reinterpret_cast<const uint32_t*>(from + 1024 + lane * 4)};
}

// Four codes of a token to the halves (0, 2) and (1, 3), as the words of weights are taken apart.
TILEWRIGHT_DEVICE void widen(uint32_t codes, uint32_t& even, uint32_t& odd) {
  even = hopper::e4m3x2_to_f16x2(static_cast<uint16_t>(__byte_perm(codes, 0u, 0x4420u)));
  odd = hopper::e4m3x2_to_f16x2(static_cast<uint16_t>(__byte_perm(codes, 0u, 0x4431u)));
}

// The tokens of a part's tiles to shared memory.
template <int kGroups>
TILEWRIGHT_DEVICE void stage_tokens(const Params& p, const Part& part, char* tokens) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint8_t* columns = p.codes + part.first_tile * Chunk::kCols + lane % 4 * 4;
#pragma unroll 8
  for (int i = warp; i < part.tiles * kSteps * kGroups; i += kWarps) {
    const int step = i / kGroups, token = i % kGroups * 8 + lane / 4;
    uint32_t low = 0, high = 0;
    if (token < p.m) {
      const uint8_t* from = columns + token * p.padded_k + step * 32;
      low = *reinterpret_cast<const uint32_t*>(from);
      high = *reinterpret_cast<const uint32_t*>(from + 16);
    }
    hopper::U128 fragment;
    widen(low, fragment.x, fragment.y);
    widen(high, fragment.z, fragment.w);
    hopper::store_16(tokens + i * kFragmentBytes + lane * 16, fragment);
  }
}

// Halves of the low nibbles of two words, rows r and r + 8: columns (0, 2) and (1, 3) of this lane's four.
TILEWRIGHT_DEVICE void take_apart(uint32_t (&a)[4], uint32_t low_row, uint32_t high_row) {
  constexpr uint32_t kMask = 0x87008700u;
  a[0] = low_row << 8 & kMask;
  a[1] = high_row << 8 & kMask;
  a[2] = low_row & kMask;
  a[3] = high_row & kMask;
}
TILEWRIGHT_DEVICE uint32_t rotated(uint32_t word) { return word >> 4 | word << 28; }

// sums += unit * tokens, those of its tile; sums[group][i] are the lane's of row lane / 4 + 8 (i / 2) and token
// 8 group + 2 (lane % 4) + i % 2.
template <int kGroups>
TILEWRIGHT_DEVICE void multiply(const Params& p, const Unit& unit, const char* tokens, float (&sums)[kGroups][4]) {
  const char* fragments = tokens + threadIdx.x % 32 * 16;
  float part[2][kGroups][4] = {};  // of low and of high nibbles: shorter chains
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const hopper::U128& words = unit.codes[step / 2];
    const uint32_t low_row = step % 2 == 0 ? words.x : words.z, high_row = step % 2 == 0 ? words.y : words.w;
    uint32_t low[4], high[4];
    take_apart(low, low_row, high_row);
    take_apart(high, rotated(low_row), rotated(high_row));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const hopper::U128 b = hopper::load_16(fragments + (step * kGroups + g) * kFragmentBytes);
      hopper::mma_m16n8k16(part[0][g], low, {b.x, b.y}, hopper::f16{});
      hopper::mma_m16n8k16(part[1][g], high, {b.z, b.w}, hopper::f16{});
    }
  }
  float scale[2];
  p.scale_type == format::ScaleType::kBFloat16 ? hopper::unpack_bf16x2(unit.scales, scale[0], scale[1])
                                               : hopper::unpack_f16x2(unit.scales, scale[0], scale[1]);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[g][i] = fmaf(part[0][g][i] + part[1][g][i], scale[i / 2], sums[g][i]);
  }
}

// What turns a token's sums into y.
TILEWRIGHT_DEVICE float output_scale(const Params& p, int token) {
  return token < p.m ? 65536.0f * (1.0f / *p.per_tensor_scale) * p.x_scales[token] : 0.0f;
}

// A result; row and token may be past the last.
TILEWRIGHT_DEVICE void write_result(const Params& p, float scale, int64_t row, int token, float sum) {
  if (row >= p.n || token >= p.m) return;
  const float bias = p.bias == nullptr ? 0.0f : load_number(p.bias, row, p.bias_type);
  const int64_t place = token * p.n + row;
  float value = fmaf(sum, scale, bias);
  if (p.residual != nullptr) value += load_number(p.residual, place, p.y_type);
  store_number(p.y, place, p.y_type, value);
}

template <int kGroups>  // of 8 tokens
struct Kernel {
  using Sums = float[kGroups][4];
  static constexpr int kTokens = 8 * kGroups;
  static constexpr int kPanelSums = kPanelRows * kTokens;

  // Where a warp's next unit comes from.
  struct Source {
    Place from;
    int left, panel;  // units to the end of the panel

    TILEWRIGHT_DEVICE void seek(const Params& p, const Part& part, int at_panel, int tile) {
      from.seek(p, part.first_panel + at_panel, part.first_tile + tile);
      left = part.tiles - tile;
      panel = at_panel;
    }
    TILEWRIGHT_DEVICE void copy(const Params& p, const Part& part, char* to) {
      from.copy(p, to);
      if (--left == 0 && panel + 1 < part.panels) seek(p, part, panel + 1, 0);
    }
  };

  // --- Shared memory: units on the way, tokens, the sums of every (warp, panel) that meet, those of the panels.
  static TILEWRIGHT_DEVICE char* place_of(int unit) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return hopper::shared_memory() + (warp * kAhead + unit % kAhead) * kUnitBytes;
  }
  static TILEWRIGHT_DEVICE char* tokens() { return hopper::shared_memory() + kWarps * kAhead * kUnitBytes; }
  static TILEWRIGHT_DEVICE float* slots(const Params& p) {
    return reinterpret_cast<float*>(tokens() + p.cut.tiles_of_block() * kTileBytes * kGroups);
  }
  static TILEWRIGHT_DEVICE float* panel_sums(const Params& p) {
    return slots(p) + (kWarps + p.cut.panels_of_block - 1) * kPanelSums;
  }

  // What a warp has of a panel; the slots of those that meet follow one another. [token][16 rows].
  static TILEWRIGHT_DEVICE void leave(const Params& p, int panel, Sums& sums) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    float* slot = slots(p) + (warp + panel) * kPanelSums;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        slot[(g * 8 + lane % 4 * 2 + i % 2) * kPanelRows + lane / 4 + i / 2 * 8] = sums[g][i];
        sums[g][i] = 0;
      }
    }
  }

  // A warp's run of `count` units; the first kAhead are on their way.
  static TILEWRIGHT_DEVICE void walk(const Params& p, const Part& part, int count, Source& source) {
    const int first = part.first_unit(static_cast<int>(threadIdx.x) / 32);
    int panel = first / part.tiles, tile = first % part.tiles;
    Sums sums = {};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      hopper::copy_async_wait<kAhead - 1>();
      char* place = place_of(i);
      const Unit unit = load_unit(place);
      multiply<kGroups>(p, unit, tokens() + tile * (kTileBytes * kGroups), sums);
      if (i + kAhead < count) source.copy(p, part, place);  // the unit is in registers, and used
      hopper::copy_async_commit();
      if (++tile == part.tiles || i + 1 == count) {
        leave(p, panel, sums);
        tile = 0;
        ++panel;
      }
    }
  }

  // The warps' sums of an element of a panel, in the order of K.
  static TILEWRIGHT_DEVICE float sum_of_panel(const Params& p, const Part& part, int panel, int element) {
    float sum = 0;
    const int last = part.warp_of((panel + 1) * part.tiles - 1);
    for (int warp = part.warp_of(panel * part.tiles); warp <= last; ++warp) {
      const bool idle = part.units() < kWarps && part.first_unit(warp) == part.first_unit(warp + 1);
      if (!idle) sum += slots(p)[(warp + panel) * kPanelSums + element];
    }
    return sum;
  }

  // The token whose sums a thread adds up, always the same: a warp takes two tokens of a panel at a time.
  static constexpr int kPairs = kTokens / 2;
  static_assert(kWarps % kPairs == 0);
  static TILEWRIGHT_DEVICE int own_token() {
    return static_cast<int>(threadIdx.x) / 32 % kPairs * 2 + static_cast<int>(threadIdx.x) % 32 / kPanelRows;
  }

  static TILEWRIGHT_DEVICE void write(const Params& p, const Part& part, float scale, int panel, float sum) {
    const int64_t row = static_cast<int64_t>(part.first_panel + panel) * kPanelRows + threadIdx.x % kPanelRows;
    write_result(p, scale, row, own_token(), sum);
  }

  // A block alone writes its panels; of a cluster's blocks each adds up and writes every splits-th one.
  static TILEWRIGHT_DEVICE void finish(const Params& p, const Part& part, float scale) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    float* sums = panel_sums(p);
    for (int i = warp; i < part.panels * kPairs; i += kWarps) {
      const float sum = sum_of_panel(p, part, i / kPairs, i % kPairs * 32 + lane);
      if (p.cut.splits == 1) {
        write(p, part, scale, i / kPairs, sum);
      } else {
        sums[i * 32 + lane] = sum;
      }
    }
    if (p.cut.splits == 1) return;
    hopper::cluster_sync();
    for (int i = warp; i < part.panels * kPairs; i += kWarps) {
      if (i / kPairs % p.cut.splits != part.rank) continue;
      float sum = 0;
      for (int rank = 0; rank < p.cut.splits; ++rank) sum += hopper::load_cluster(sums + i * 32 + lane, rank);
      write(p, part, scale, i / kPairs, sum);
    }
    hopper::cluster_sync();  // no block leaves while another may still read from it
  }

  static TILEWRIGHT_DEVICE void run(const Params& p) {
    const Part part(p.cut);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int first = part.first_unit(warp), count = part.first_unit(warp + 1) - first;
    Source source;
    source.seek(p, part, first / part.tiles, first % part.tiles);
    if (!p.weights_first) hopper::wait_for_previous_kernel();
    for (int i = 0; i < kAhead; ++i) {
      if (i < count) source.copy(p, part, place_of(i));
      hopper::copy_async_commit();
    }
    if (p.weights_first) hopper::wait_for_previous_kernel();
    hopper::allow_next_kernel();
    const float scale = output_scale(p, own_token());
    stage_tokens<kGroups>(p, part, tokens());
    __syncthreads();
    walk(p, part, count, source);
    __syncthreads();
    finish(p, part, scale);
  }
};

template <int kGroups>
__global__ void __launch_bounds__(kThreads, 1) int4_fp8_stream_kernel(const __grid_constant__ Params p) {
  Kernel<kGroups>::run(p);
}

}  // namespace tilewright::int4_linear::stream
