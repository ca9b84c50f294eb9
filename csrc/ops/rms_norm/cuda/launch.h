// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "hopper/stream.h"

namespace tilewright::rms_norm {

struct CudaProblem {
  const float* x;  // [tokens, width]
  const float* weight;  // [width]
  float* y;  // [tokens, width]
  int64_t tokens, width;
  float eps;
};

void launch(const CudaProblem&, hopper::Stream);

}  // namespace tilewright::rms_norm
