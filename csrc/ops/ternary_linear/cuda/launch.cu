// SPDX-License-Identifier: Apache-2.0
#include "ops/ternary_linear/cuda/large.cuh"
#include "ops/ternary_linear/cuda/launch.h"
#include "ops/ternary_linear/cuda/quantize.cuh"
#include "ops/ternary_linear/cuda/small.cuh"

namespace tilewright::ternary_linear::cuda {
namespace {

// Tokens [first, first + count) alone.
Problem slice(const Problem& problem, int64_t first, int64_t count) {
  const bool wide = problem.out.element == Element::kInt32 || problem.out.element == Element::kFloat;
  Problem part = problem;
  part.m = count;
  part.x += first * problem.x_stride;
  part.out.y = static_cast<char*>(problem.out.y) + first * problem.n * (wide ? 4 : 2);
  if (part.out.token_scales != nullptr) part.out.token_scales += first;
  return part;
}

// x in boxes of 128 columns by `rows` tokens.
hopper::TensorMap tokens_map(const Problem& problem, uint32_t rows) {
  // Without columns nothing is copied, but a map must have some.
  const uint64_t sizes[2] = {static_cast<uint64_t>(problem.k > 0 ? problem.k : 1), static_cast<uint64_t>(problem.m)};
  const uint64_t strides[1] = {static_cast<uint64_t>(problem.x_stride)};
  const uint32_t box[2] = {TernaryMma2::kColsPerChunk, rows};
  return hopper::make_tensor_map<int8_t>(problem.x, 2, sizes, strides, box, hopper::Swizzle::k128);
}

void launch_small(const Problem& problem, const DevicePlan& plan, bool follows, hopper::Stream stream) {
  const bool one = problem.m <= 8;
  const uint32_t rows = one ? 8 : 16;
  const SmallParams params{
      .problem = problem,
      .tokens = tokens_map(problem, rows),
      .panels = plan.panels,
      .phase_chunks = one ? kSmallPhaseChunks : kSmallPhaseChunks / 2,
      .cluster = plan.cluster,
      .weights_first = follows,
  };
  const hopper::Grid grid{.blocks = {plan.blocks},
                          .threads = kSmallWarps * 32,
                          .cluster = plan.cluster,
                          .shared_bytes = plan.shared_bytes,
                          .stream = stream,
                          .overlap = true};
  hopper::launch(one ? small_kernel<1> : small_kernel<2>, grid, params);
}

template <int kTokens, int kSubtiles>
void launch_large(const Problem& problem, const DevicePlan& plan, bool follows, hopper::Stream stream) {
  const LargeParams params{
      .problem = problem,
      .tokens = tokens_map(problem, kTokens),
      .row_tiles = plan.row_tiles,
      .token_tiles = plan.token_tiles,
      .splits = plan.splits,
      .chunks = TernaryMma2::chunks(problem.k),
      .weights_first = follows,
  };
  const hopper::Grid grid{.blocks = {plan.blocks},
                          .threads = Large<kTokens, kSubtiles>::kThreads,
                          .shared_bytes = plan.shared_bytes,
                          .stream = stream,
                          .overlap = true};
  hopper::launch(large_kernel<kTokens, kSubtiles>, grid, params);
}

}  // namespace

DevicePlan plan_on_device(int64_t m, int64_t n, int64_t k) {
  return choose_device_plan(m, n, k, hopper::multiprocessors());
}

void launch_matmul(const Problem& problem, const DevicePlan& plan, bool follows, hopper::Stream stream) {
  if (problem.m == 0 || problem.n == 0) return;
  if (plan.small) {
    for (int64_t first = 0; first < problem.m; first += kMostSmallTokens) {
      const int64_t count = problem.m - first < kMostSmallTokens ? problem.m - first : kMostSmallTokens;
      launch_small(slice(problem, first, count), plan, follows && first == 0, stream);
    }
    return;
  }
  if (plan.tile_tokens == 32) return launch_large<32, 1>(problem, plan, follows, stream);
  if (plan.tile_tokens == 64) return launch_large<64, 1>(problem, plan, follows, stream);
  if (plan.subtiles == 1) return launch_large<128, 1>(problem, plan, follows, stream);
  launch_large<128, 2>(problem, plan, follows, stream);
}

void launch_quantize(const Quantize& problem, hopper::Stream stream) {
  const hopper::Grid grid{.blocks = {problem.m},
                          .threads = kQuantizeThreads,
                          .shared_bytes = kQuantizeThreads / 32 * 4,
                          .stream = stream,
                          .overlap = true};
  switch (problem.element) {
    case Element::kBFloat16: return hopper::launch(quantize_kernel<hopper::bf16>, grid, problem);
    case Element::kHalf: return hopper::launch(quantize_kernel<hopper::f16>, grid, problem);
    default: return hopper::launch(quantize_kernel<float>, grid, problem);
  }
}

void launch_pad(const int8_t* x, int64_t m, int64_t k, int8_t* padded, int64_t stride, hopper::Stream stream) {
  const hopper::Grid grid{.blocks = {ceil_div(m * stride, 256)}, .threads = 256, .stream = stream};
  hopper::launch(pad_kernel, grid, PadParams{x, padded, m, k, stride});
}

void launch_unpack(const uint8_t* payload, int64_t n, int64_t k, int8_t* out, hopper::Stream stream) {
  const hopper::Grid grid{.blocks = {ceil_div(n * k, 256)}, .threads = 256, .stream = stream};
  hopper::launch(unpack_kernel, grid, UnpackParams{payload, out, n, k});
}

}  // namespace tilewright::ternary_linear::cuda
