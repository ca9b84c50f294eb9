// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_linear/cuda/launch.cuh"

namespace tilewright::int4_linear {

void multiply_unsigned(const MatrixProblem& problem, const DevicePlan& plan, hopper::Stream stream) {
  constexpr Form kForm = Form::kUnsigned;
  if (plan.fine) {
    if (plan.token_tile == 16) return launch_matrix<Config<16, 1, kForm, true>>(problem, plan, stream);
    return launch_matrix<Config<128, 1, kForm, true>>(problem, plan, stream);
  }
  if (plan.token_tile == 16) return launch_matrix<Config<16, 1, kForm, false>>(problem, plan, stream);
  launch_matrix<Config<128, 1, kForm, false>>(problem, plan, stream);
}

}  // namespace tilewright::int4_linear
