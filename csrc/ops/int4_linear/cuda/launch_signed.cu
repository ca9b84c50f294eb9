// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_linear/cuda/launch.cuh"

namespace tilewright::int4_linear {

void multiply_signed(const MatrixProblem& problem, const DevicePlan& plan, hopper::Stream stream) {
  constexpr Form kForm = Form::kSigned;
  if (plan.fine) {
    if (plan.token_tile == 16) return launch_matrix<Config<16, 1, kForm, true>>(problem, plan, stream);
    return launch_matrix<Config<128, 1, kForm, true>>(problem, plan, stream);
  }
  switch (plan.token_tile) {
    case 16: return launch_matrix<Config<16, 1, kForm, false>>(problem, plan, stream);
    case 32: return launch_matrix<Config<32, 1, kForm, false>>(problem, plan, stream);
    case 64: return launch_matrix<Config<64, 1, kForm, false>>(problem, plan, stream);
    default: break;
  }
  if (plan.group_blocks == 1) return launch_matrix<Config<128, 1, kForm, false>>(problem, plan, stream);
  launch_matrix<Config<128, 2, kForm, false>>(problem, plan, stream);
}

}  // namespace tilewright::int4_linear
