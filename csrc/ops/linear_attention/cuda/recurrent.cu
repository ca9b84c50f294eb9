// SPDX-License-Identifier: Apache-2.0
// The recurrent kernel's instances and the shape of its grid.
#include "core/memory.h"
#include "core/require.h"
#include "ops/linear_attention/cuda/launch.h"
#include "ops/linear_attention/cuda/recurrent.cuh"

namespace tilewright::linear_attention::cuda {
namespace {

// Small blocks, several a multiprocessor: while one stores its state, others load theirs.
constexpr int kMaxWarps = 4;

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class In>
bool wide(const Rows<const In>& rows) {
  constexpr int64_t kPer16 = 16 / static_cast<int64_t>(sizeof(In));
  return aligned(rows.data) && rows.batch % kPer16 == 0 && rows.token % kPer16 == 0 && rows.head % kPer16 == 0;
}

// Warps of a block: as many as there are columns for, fewer where that would leave multiprocessors idle.
int warps_of_block(int64_t warps_of_state, int64_t states) {
  int64_t warps = warps_of_state < kMaxWarps ? warps_of_state : kMaxWarps;
  while (warps > 1 && states * ceil_div(warps_of_state, warps) < 2 * hopper::multiprocessors())
    warps = ceil_div(warps, 2);
  return static_cast<int>(warps);
}

}  // namespace

template <class In, class T>
void launch_recurrent(const Problem<In, T>& problem, hopper::Stream stream) {
  constexpr int64_t kCols = recurrent::Tile<T>::kCols;
  require(problem.key_size <= kMaxRecurrentKeys, "linear_attention: q has K = ", problem.key_size, ", needed at most ",
          kMaxRecurrentKeys, " on a CUDA device; split the heads, or run on the CPU");
  RecurrentParams<In, T> params{problem, 1, 1, wide(problem.q) && wide(problem.k), false};
  while (params.row_lanes * kRecurrentRows < problem.key_size) params.row_lanes *= 2;
  params.wide_state = problem.value_size % kCols == 0 && aligned(problem.initial) && aligned(problem.state);
  const int64_t states = problem.sequences.count * problem.value_heads;
  const int64_t warps_of_state = ceil_div(problem.value_size, 32 / params.row_lanes * kCols);
  const int warps = warps_of_block(warps_of_state, states);
  params.tiles = static_cast<int>(ceil_div(warps_of_state, warps));
  const auto kernel = problem.sequences.tokens > 1 ? recurrent_kernel<In, T, true> : recurrent_kernel<In, T, false>;
  hopper::launch(kernel, {.blocks = {.x = states * params.tiles}, .threads = 32 * warps, .stream = stream}, params);
}

template void launch_recurrent(const Problem<hopper::bf16, float>&, hopper::Stream);
template void launch_recurrent(const Problem<hopper::f16, float>&, hopper::Stream);
template void launch_recurrent(const Problem<float, float>&, hopper::Stream);
template void launch_recurrent(const Problem<double, double>&, hopper::Stream);

}  // namespace tilewright::linear_attention::cuda
