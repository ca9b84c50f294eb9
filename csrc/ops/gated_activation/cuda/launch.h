// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "hopper/stream.h"

namespace tilewright::gated_activation {

struct CudaProblem {
  const float* gate;  // [count]
  const float* up;  // [count]
  float* y;  // [count]
  int64_t count;
};

void launch(const CudaProblem&, hopper::Stream);

}  // namespace tilewright::gated_activation
