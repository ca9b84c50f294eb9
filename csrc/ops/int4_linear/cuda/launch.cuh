// SPDX-License-Identifier: Apache-2.0
// A kernel's parameters from a problem and its plan; launch*.cu instantiate.
#pragma once

#include "ops/int4_linear/cuda/epilogue.cuh"

namespace tilewright::int4_linear {

template <class C>
hopper::TensorMap map_tokens(const MatrixProblem& problem) {
  const auto padded_k = static_cast<uint64_t>(problem.weight.tiles * Int4Hopper::kCols);
  const uint64_t sizes[2] = {padded_k, static_cast<uint64_t>(problem.m)};
  const uint64_t strides[1] = {padded_k};
  const uint32_t box[2] = {Int4Hopper::kCols, C::kTokens / C::kCluster};
  return hopper::make_tensor_map<hopper::e4m3>(problem.codes, 2, sizes, strides, box, hopper::Swizzle::k128);
}

inline hopper::TensorMap map_chunks(const MatrixProblem& problem) {
  const uint64_t sizes[2] = {kLineBytes, static_cast<uint64_t>(problem.weight.payload_bytes() / kLineBytes)};
  const uint64_t strides[1] = {kLineBytes};
  const uint32_t box[2] = {kLineBytes, static_cast<uint32_t>(problem.weight.chunk_bytes / kLineBytes)};
  return hopper::make_tensor_map<uint8_t>(problem.blob + Int4Hopper::kPayloadOffset, 2, sizes, strides, box,
                                          hopper::Swizzle::k128);
}

inline bool is_aligned(const void* rows) { return reinterpret_cast<uintptr_t>(rows) % 16 == 0; }

template <class C>
void launch_matrix(const MatrixProblem& problem, const DevicePlan& plan, hopper::Stream stream) {
  const MatrixParams params{
      .x = map_tokens<C>(problem),
      .chunks = map_chunks(problem),
      .per_tensor_scale =
          reinterpret_cast<const float*>(problem.blob + offsetof(format::PackedHeader, per_tensor_scale)),
      .x_scales = problem.scales,
      .x_sums = problem.sums,
      .bias = problem.bias,
      .residual = problem.residual,
      .y = problem.y,
      .pieces = problem.pieces,
      .counters = problem.counters,
      .m = problem.m,
      .n = problem.weight.n,
      .k = problem.weight.k,
      .sums_stride = problem.sums_stride,
      .piece_floats = plan.piece_floats(),
      .chunk_bytes = static_cast<int>(problem.weight.chunk_bytes),
      .slot_bytes = slot_bytes(problem.weight),
      .row_blocks = static_cast<int>(problem.weight.blocks),
      .token_tiles = plan.token_tiles,
      .stages = plan.stages,
      .sub = problem.weight.sub,
      .scale_bytes = static_cast<int>(format::scale_bytes(problem.weight.scale_type)),
      .scale_type = problem.weight.scale_type,
      .offset_kind = problem.weight.offset_kind,
      .bias_type = problem.bias_type,
      .y_type = problem.y_type,
      .narrow = problem.y_type != Number::kFloat32 && problem.weight.n % 8 == 0 && is_aligned(problem.y) &&
                is_aligned(problem.residual),
      .overlap = problem.overlap,
      .work = plan.work,
  };
  hopper::launch(int4_fp8_kernel<C>,
                 {.blocks = {plan.work.blocks * C::kCluster, 1, 1},
                  .threads = kMatrixThreads,
                  .cluster = C::kCluster,
                  .shared_bytes = plan.shared_bytes,
                  .stream = stream,
                  .overlap = problem.overlap},
                 params);
}

// Few tokens.
void multiply_stream(const MatrixProblem& problem, const DevicePlan& plan, hopper::Stream stream);

// One function a translation unit: the kernels of a form for the token tiles that choose_tile() gives it.
void multiply_signed(const MatrixProblem& problem, const DevicePlan& plan, hopper::Stream stream);
void multiply_unsigned(const MatrixProblem& problem, const DevicePlan& plan, hopper::Stream stream);
void multiply_fold(const MatrixProblem& problem, const DevicePlan& plan, hopper::Stream stream);

}  // namespace tilewright::int4_linear
