// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_linear/cuda/launch.cuh"
#include "ops/int4_linear/cuda/quantize.cuh"

namespace tilewright::int4_linear {

void quantize_tokens(const QuantizeProblem& problem, hopper::Stream stream) {
  const hopper::Grid grid{.blocks = {problem.m, 1, 1},
                          .threads = kQuantizeThreads,
                          .shared_bytes = 2 * kQuantizeWarps * 4,
                          .stream = stream,
                          .overlap = true};
  switch (problem.type) {
    case Number::kFloat32: return hopper::launch(quantize_kernel<float>, grid, problem);
    case Number::kBFloat16: return hopper::launch(quantize_kernel<hopper::bf16>, grid, problem);
    case Number::kFloat16: return hopper::launch(quantize_kernel<hopper::f16>, grid, problem);
  }
}

void multiply(const MatrixProblem& problem, const DevicePlan& plan, hopper::Stream stream) {
  if (plan.stream.fits) return multiply_stream(problem, plan, stream);
  switch (plan.form) {
    case Form::kSigned: return multiply_signed(problem, plan, stream);
    case Form::kUnsigned: return multiply_unsigned(problem, plan, stream);
    case Form::kFold: return multiply_fold(problem, plan, stream);
  }
}

int multiprocessors() { return hopper::multiprocessors(); }

}  // namespace tilewright::int4_linear
