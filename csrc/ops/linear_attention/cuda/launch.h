// SPDX-License-Identifier: Apache-2.0
// Starting the forward kernels. In is hopper::bf16, hopper::f16, float or double.
#pragma once

#include "hopper/stream.h"
#include "ops/linear_attention/cuda/plan.h"

namespace tilewright::linear_attention::cuda {

// Token by token, K up to 512.
template <class In, class T>
void launch_recurrent(const Problem<In, T>& problem, hopper::Stream stream);

// The chunk form, for problems that takes_chunks: its two kernels one after the other, in memory of chunk_form_bytes.
template <class In>
void launch_chunks(const Problem<In, float>& problem, char* memory, hopper::Stream stream);

}  // namespace tilewright::linear_attention::cuda
