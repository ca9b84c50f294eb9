// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "hopper/stream.h"

namespace tilewright::rope {

struct CudaRotation {
  float* x;  // [tokens, heads, head_dim], rotated in place
  const float* angles;  // [tokens, 2, head_dim / 2]: cosines, sines
  const float* scales;  // [heads / heads_per_scale, head_dim] or null
  int64_t tokens, heads, head_dim, heads_per_scale;
};

struct CudaAngles {
  const int64_t* positions;  // [tokens]
  const float* frequencies;  // [pairs]
  float* angles;  // [tokens, 2, pairs]
  int64_t tokens, pairs;
  float gain;
};

void launch(const CudaRotation&, hopper::Stream);
void launch(const CudaAngles&, hopper::Stream);

}  // namespace tilewright::rope
