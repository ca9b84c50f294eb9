// SPDX-License-Identifier: Apache-2.0
// Rotary positions (Su et al. 2021, eq. 15) in the half-split convention of transformers: the pair (c, c + D/2) of every
// head turns by the token's angle of c; afterwards channel c may be multiplied by a constant (FireQ's post-RoPE scale).
#pragma once

#include <cstdint>

#include "isa/isa.h"

namespace tilewright::rope {

struct Problem {
  float* x;  // [heads, D], rotated in place: one token
  int64_t heads;
  int64_t head_dim;  // D, even
  const float* cosines;  // [D/2]
  const float* sines;  // [D/2]
  const float* scales;  // [heads / heads_per_scale, D] or null
  int64_t heads_per_scale;
};

using Rotate = void (*)(const Problem&);

// cos and sin of position * frequency (the product in float32, as transformers forms it) times gain.
void angles(int64_t position, const float* frequencies, int64_t pairs, float gain, float* cosines, float* sines);

namespace generic {
void rotate(const Problem&);
}
namespace avx2 {
void rotate(const Problem&);
}
namespace avx512 {
void rotate(const Problem&);
}

inline Rotate kernel() {
#if defined(__x86_64__)
  static constexpr isa::Table<Rotate> table{{generic::rotate, avx2::rotate, avx512::rotate, avx512::rotate}};
  return table.pick();
#else
  return generic::rotate;
#endif
}

}  // namespace tilewright::rope
