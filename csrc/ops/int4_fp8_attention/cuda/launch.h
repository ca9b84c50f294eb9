// SPDX-License-Identifier: Apache-2.0
// Starting the CUDA kernels. Nothing waits for the device.
#pragma once

#include "hopper/stream.h"
#include "ops/int4_fp8_attention/cuda/problem.h"

namespace tilewright::int4_fp8_attention::cuda {

// Quantizes and places the tokens, then advances the lengths.
void append(const Append& problem, hopper::Stream stream);

// Floats that Attention::partials must point to.
int64_t partials_needed(const Attention& problem);

void attend(const Attention& problem, hopper::Stream stream);

// The kernels that attend() chooses from.
void attend_plain(const Attention& problem, hopper::Stream stream);
void attend_decode(const Attention& problem, hopper::Stream stream);
void attend_prefill(const Attention& problem, hopper::Stream stream);

}  // namespace tilewright::int4_fp8_attention::cuda
