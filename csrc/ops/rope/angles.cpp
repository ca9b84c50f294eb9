// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "ops/rope/kernels.h"

namespace tilewright::rope {

void angles(int64_t position, const float* frequencies, int64_t pairs, float gain, float* cosines, float* sines) {
  for (int64_t i = 0; i < pairs; ++i) {
    const double angle = static_cast<float>(position) * frequencies[i];
    cosines[i] = static_cast<float>(std::cos(angle)) * gain;
    sines[i] = static_cast<float>(std::sin(angle)) * gain;
  }
}

}  // namespace tilewright::rope
