// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_linear/cuda/launch.cuh"
#include "ops/int4_linear/cuda/stream.cuh"

namespace tilewright::int4_linear {

void multiply_stream(const MatrixProblem& problem, const DevicePlan& plan, hopper::Stream on) {
  const format::Int4HopperView& weight = problem.weight;
  const stream::Params params{
      .cut = plan.stream,
      .chunks = problem.blob + Int4Hopper::kPayloadOffset,
      .per_tensor_scale =
          reinterpret_cast<const float*>(problem.blob + offsetof(format::PackedHeader, per_tensor_scale)),
      .codes = problem.codes,
      .x_scales = problem.scales,
      .bias = problem.bias,
      .residual = problem.residual,
      .y = problem.y,
      .m = problem.m,
      .n = weight.n,
      .padded_k = weight.tiles * Int4Hopper::kCols,
      .chunk_bytes = static_cast<int>(weight.chunk_bytes),
      .scale_type = weight.scale_type,
      .bias_type = problem.bias_type,
      .y_type = problem.y_type,
      .weights_first = problem.overlap,
  };
  const hopper::Grid grid{.blocks = {plan.stream.blocks(), 1, 1},
                          .threads = stream::kThreads,
                          .cluster = plan.stream.splits,
                          .shared_bytes = plan.stream.shared_bytes,
                          .stream = on,
                          .overlap = true};
  hopper::launch(problem.m <= 8 ? stream::int4_fp8_stream_kernel<1> : stream::int4_fp8_stream_kernel<2>, grid, params);
}

}  // namespace tilewright::int4_linear
