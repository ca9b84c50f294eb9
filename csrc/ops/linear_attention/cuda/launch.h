// SPDX-License-Identifier: Apache-2.0
// Starting the forward kernels. In is hopper::bf16, hopper::f16, float or double.
#pragma once

#include "hopper/stream.h"
#include "ops/linear_attention/cuda/prepared.h"

namespace tilewright::linear_attention::cuda {

// Token by token, K up to 512.
template <class In, class T>
void launch_recurrent(const Problem<In, T>& problem, hopper::Stream stream);

// Whether the chunk form takes a problem: 16-bit inputs, K at most 128, rows that begin at multiples of 16 bytes.
template <class In, class T>
bool takes_chunks(const Problem<In, T>& problem);

// Bytes of device memory that launch_chunks works in, aligned to 1024 within them; the memory itself to 16.
template <class In, class T>
int64_t chunk_form_bytes(const Problem<In, T>& problem);

// The chunk form; its two kernels one after the other.
template <class In>
void launch_chunks(const Problem<In, float>& problem, char* memory, hopper::Stream stream);

// The first of them alone, for the backward pass.
template <class In>
void launch_prepare(const Problem<In, float>& problem, const Prepared& to, hopper::Stream stream);

}  // namespace tilewright::linear_attention::cuda
