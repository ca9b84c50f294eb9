// SPDX-License-Identifier: Apache-2.0
// The GPU's kernels of ternary_linear, started on a stream. Weights are of packing mma2.
#pragma once

#include <cstdint>

#include "hopper/stream.h"
#include "ops/ternary_linear/cuda/plan.h"

namespace tilewright::ternary_linear::cuda {

enum class Element : int { kInt32 = 0, kFloat = 1, kBFloat16 = 2, kHalf = 3 };

// What becomes of the integers: themselves, or y = acc * (token_scale * weight_scale) (+ bias) rounded to the element.
struct Output {
  void* y;                      // [M, N]
  Element element;
  const float* token_scales = nullptr;  // [M]; null for kInt32
  const float* weight_scales = nullptr;  // [1] or [N]
  int64_t weight_scale_step = 0;  // 0 or 1
  const float* bias = nullptr;  // [N] or null
};

struct Problem {
  const uint8_t* payload;
  const int8_t* x;         // [M, x_stride]
  int64_t x_stride;        // a multiple of 16, at least K; the address is one too
  int64_t m, n, k;
  Output out;
  int32_t* partial = nullptr;  // sums of splits, see partial_count; null for one split
  uint32_t* tickets = nullptr;  // [tiles], zero; null for one split
};

// int32 values that the splits of a plan exchange.
inline int64_t partial_count(const DevicePlan& plan) {
  return plan.splits == 1 ? 0 : plan.tiles() * plan.splits * plan.tile_rows() * plan.tile_tokens;
}

// The plan for the current device.
DevicePlan plan_on_device(int64_t m, int64_t n, int64_t k);

// follows: the kernel before it on the stream is launch_quantize's, whose end it awaits itself.
void launch_matmul(const Problem& problem, const DevicePlan& plan, bool follows, hopper::Stream stream);

// x [M, K] with rows row_stride elements apart -> codes [M, stride] and scales [M], as activation.h says; zeroes tickets.
struct Quantize {
  const void* x;
  Element element;   // not kInt32
  int64_t m, k;
  int8_t* codes;
  int64_t stride;    // a multiple of 16
  float* scales;
  uint32_t* tickets;
  int64_t ticket_count;
};
void launch_quantize(const Quantize& problem, hopper::Stream stream);

// int8 rows [M, K] to rows of stride bytes, zero from K on.
void launch_pad(const int8_t* x, int64_t m, int64_t k, int8_t* padded, int64_t stride, hopper::Stream stream);

// int8 [N, K] of -1, 0, 1.
void launch_unpack(const uint8_t* payload, int64_t n, int64_t k, int8_t* out, hopper::Stream stream);

}  // namespace tilewright::ternary_linear::cuda
