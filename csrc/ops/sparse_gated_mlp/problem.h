// SPDX-License-Identifier: Apache-2.0
// y = sum over kept j of  a_j (W_up[j,:] . x) W_down[:,j],  a = act(W_gate x), j kept where not |a_j| < threshold_j
// (CATS, arXiv 2404.08763). Rows of W_up and of W_down^T that no token keeps are not read.
#pragma once

#include <cstdint>

namespace tilewright::sparse_gated_mlp {

enum class Function : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };
inline constexpr int64_t kFunctions = 4;

// Neuron j goes to partial sum j mod 32 of every column, in order; the 32 sums are added by halving. It is the order of
// a dot product over j in bfloat16_linear: the sparse form has the bits of the dense one.
inline constexpr int64_t kClasses = 32;

// Weight: float, uint16_t (bits of bfloat16), or double in the reference. Real: what is computed in.
template <class Weight, class Real>
struct Problem {
  int64_t tokens, hidden, inner;   // T, D, M
  int64_t stride;                  // elements between rows of the weights and of x, at least D
  Function function;
  const Real* x;                   // [T, D]
  const Weight* gate;              // [M, D]
  const Weight* up;                // [M, D]
  const Weight* down;              // [M, D]: W_down^T
  const Real* gate_bias;           // [M] or null
  const Real* up_bias;             // [M] or null
  const Real* down_bias;           // [D] or null
  const float* threshold;          // [1] or [M], in float32 for every Real
  int64_t threshold_stride;        // 0 or 1
  Real* activation;                // [T, M], 0 where dropped
  uint8_t* kept;                   // [T, M]

  // Rows that some token keeps, or all of them: ascending, and their places in that list by class (j mod 32).
  const int32_t* rows;             // [count]
  int64_t count;
  const int32_t* by_class;         // [count]
  const int32_t* class_starts;     // [kClasses + 1]
  Real* h;                         // [count, T]: activation times up, 0 where dropped
  Real* y;                         // [T, D], rows D apart
};

}  // namespace tilewright::sparse_gated_mlp
