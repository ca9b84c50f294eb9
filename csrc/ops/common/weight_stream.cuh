// SPDX-License-Identifier: Apache-2.0
// A product of few tokens, bound by reading the weights: what int4_linear and ternary_linear share.
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
// A format F has
//   Params        with `cut`, `weights_first` and what its own functions read
//   Sum           of an element: float or int32_t
//   kAhead        units that a warp has on the way
//   kTileBytes    of 8 tokens by a tile in shared memory
//   kUnitBytes    of a unit in shared memory
//   Unit          a lane's part of a unit
//   Source        seek(params, panel, tile), then copy(to) for that tile and each one after it: this lane's part to `to`, a
//                 unit's place, in copies of cp.async
//   load(from)    the Unit of what came
//   stage(params, part, tokens)           all threads: the tokens of the part's tiles to shared memory
//   multiply(params, unit, tokens, sums)  sums += unit * tokens; `tokens` are the tile's, sums[group][i] the lane's of row
//                                         row_of(lane, i) and token 8 group + 2 (lane % 4) + i % 2
//   Output        what results of a token need, made by output_of(params, token) while weights are on their way
//   write(params, output, row, token, sum)   a result; row and token may be past the last
#pragma once

#include "hopper/hopper.h"
#include "ops/common/weight_stream.h"

namespace tilewright::weight_stream {

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

template <class F, int kGroups>  // of 8 tokens
struct Kernel {
  using Params = typename F::Params;
  using Sum = typename F::Sum;
  using Sums = Sum[kGroups][4];
  static constexpr int kAhead = F::kAhead;
  static constexpr int kTokens = 8 * kGroups;
  static constexpr int kPanelSums = kPanelRows * kTokens;

  // Where a warp's next unit comes from.
  struct Source {
    typename F::Source from;
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
    return hopper::shared_memory() + (warp * kAhead + unit % kAhead) * F::kUnitBytes;
  }
  static TILEWRIGHT_DEVICE char* tokens() { return hopper::shared_memory() + kWarps * kAhead * F::kUnitBytes; }
  static TILEWRIGHT_DEVICE Sum* slots(const Params& p) {
    return reinterpret_cast<Sum*>(tokens() + p.cut.tiles_of_block() * F::kTileBytes * kGroups);
  }
  static TILEWRIGHT_DEVICE Sum* panel_sums(const Params& p) {
    return slots(p) + (kWarps + p.cut.panels_of_block - 1) * kPanelSums;
  }

  // What a warp has of a panel; the slots of those that meet follow one another. [token][16 rows].
  static TILEWRIGHT_DEVICE void leave(const Params& p, int panel, Sums& sums) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    Sum* slot = slots(p) + (warp + panel) * kPanelSums;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        slot[(g * 8 + lane % 4 * 2 + i % 2) * kPanelRows + F::row_of(lane, i)] = sums[g][i];
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
      const typename F::Unit unit = F::load(place);
      F::template multiply<kGroups>(p, unit, tokens() + tile * (F::kTileBytes * kGroups), sums);
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
  static TILEWRIGHT_DEVICE Sum sum_of_panel(const Params& p, const Part& part, int panel, int element) {
    Sum sum = 0;
    if (part.tiles == 0) return sum;
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

  static TILEWRIGHT_DEVICE void write(const Params& p, const Part& part, const typename F::Output& output, int panel,
                                      Sum sum) {
    const int64_t row = static_cast<int64_t>(part.first_panel + panel) * kPanelRows + threadIdx.x % kPanelRows;
    F::write(p, output, row, own_token(), sum);
  }

  // A block alone writes its panels; of a cluster's blocks each adds up and writes every splits-th one.
  static TILEWRIGHT_DEVICE void finish(const Params& p, const Part& part, const typename F::Output& output) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    Sum* sums = panel_sums(p);
    for (int i = warp; i < part.panels * kPairs; i += kWarps) {
      const Sum sum = sum_of_panel(p, part, i / kPairs, i % kPairs * 32 + lane);
      if (p.cut.splits == 1) {
        write(p, part, output, i / kPairs, sum);
      } else {
        sums[i * 32 + lane] = sum;
      }
    }
    if (p.cut.splits == 1) return;
    hopper::cluster_sync();
    for (int i = warp; i < part.panels * kPairs; i += kWarps) {
      if (i / kPairs % p.cut.splits != part.rank) continue;
      Sum sum = 0;
      for (int rank = 0; rank < p.cut.splits; ++rank) sum += hopper::load_cluster(sums + i * 32 + lane, rank);
      write(p, part, output, i / kPairs, sum);
    }
    hopper::cluster_sync();  // no block leaves while another may still read from it
  }

  static TILEWRIGHT_DEVICE void run(const Params& p) {
    const Part part(p.cut);
    if (part.tiles == 0) {
      hopper::wait_for_previous_kernel();
      return finish(p, part, F::output_of(p, own_token()));
    }
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
    const typename F::Output output = F::output_of(p, own_token());
    F::template stage<kGroups>(p, part, tokens());
    __syncthreads();
    walk(p, part, count, source);
    __syncthreads();
    finish(p, part, output);
  }
};

template <class F, int kGroups>
__global__ void __launch_bounds__(kThreads, 1) weight_stream_kernel(const __grid_constant__ typename F::Params p) {
  Kernel<F, kGroups>::run(p);
}

template <class F>
void launch(const typename F::Params& params, int64_t tokens, hopper::Stream stream) {
  const hopper::Grid grid{.blocks = {params.cut.blocks(), 1, 1},
                          .threads = kThreads,
                          .cluster = params.cut.splits,
                          .shared_bytes = params.cut.shared_bytes,
                          .stream = stream,
                          .overlap = true};
  hopper::launch(tokens <= 8 ? weight_stream_kernel<F, 1> : weight_stream_kernel<F, 2>, grid, params);
}

}  // namespace tilewright::weight_stream
