// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward adapter of linear attention share: checks, and the problem as the kernels read it.
#pragma once

#include <type_traits>

#include "ops/linear_attention/cuda/problem.h"
#include "torch/cuda/device.h"
#include "torch/linear_attention_checks.h"

namespace tilewright::torch_adapter::device_attention {

using attention_checks::check_beta;
using attention_checks::check_packing;
using attention_checks::check_shapes;
using attention_checks::decay_of;
using attention_checks::Inputs;
using attention_checks::mutable_rows_of;
using attention_checks::rows_of;
using attention_checks::Shape;
using linear_attention::Decay;
using linear_attention::Rows;
using linear_attention::Rule;
using linear_attention::Sequences;
using linear_attention::cuda::Problem;

// Gates, states and arithmetic of inputs stored as In.
template <class In>
using Wide = std::conditional_t<std::is_same_v<In, double>, double, float>;

template <class In>
constexpr ScalarType storage_type() {
  if constexpr (std::is_same_v<In, hopper::bf16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<In, hopper::f16>) return ScalarType::Half;
  return scalar_type_of<Wide<In>>();
}

// Calls function<In>() for the type that inputs are stored in.
template <class Function>
auto for_type(ScalarType type, const Function& function) {
  if (type == ScalarType::BFloat16) return function.template operator()<hopper::bf16>();
  if (type == ScalarType::Half) return function.template operator()<hopper::f16>();
  if (type == ScalarType::Double) return function.template operator()<double>();
  return function.template operator()<float>();
}

// Refuses tensors that are not on q's device.
inline auto beside_q(const Inputs& in, const char* op) {
  return [&q = in.q, op](const Tensor& tensor, const char* argument) { require_same_device(tensor, q, op, argument); };
}

// A checked call. The tensors keep alive what the problem points to; outputs and states are yet to be set.
template <class In>
struct Call {
  using T = Wide<In>;
  static constexpr ScalarType kIn = storage_type<In>(), kWide = scalar_type_of<T>();

  Shape shape;
  Tensor q, k, v, beta, g, offsets;
  Problem<In, T> problem;

  int64_t sequences() const { return problem.sequences.count; }
  std::vector<int64_t> value_sizes() const { return {shape.batch, shape.tokens, shape.value_heads, shape.value_size}; }
  std::vector<int64_t> state_sizes() const {
    return {sequences(), shape.value_heads, shape.key_size, shape.value_size};
  }
};

// What the offsets say is read by kernels only: on the host it would cost a wait for the device.
inline Tensor check_offsets(const Inputs& in, const Shape& s, const char* op) {
  const Tensor& offsets = *in.cu_seqlens;
  require_same_device(offsets, in.q, op, "cu_seqlens");
  check_packing(offsets, s, op);
  const ScalarType type = offsets.scalar_type();
  require(type == ScalarType::Long || type == ScalarType::Int, op, ": cu_seqlens has dtype ", dtype_name(type),
          ", needed int64 or int32");
  return torch::stable::contiguous(torch::stable::to(offsets, ScalarType::Long));
}

template <class In>
Call<In> check(const Inputs& in, double scale, bool delta, const char* op) {
  using T = Wide<In>;
  constexpr ScalarType kIn = storage_type<In>(), kWide = scalar_type_of<T>();
  const Shape s = check_shapes(in, op, beside_q(in, op));
  Call<In> call{s,
                with_adjacent_rows(in.q, kIn, op, "q"),
                with_adjacent_rows(in.k, kIn, op, "k"),
                with_adjacent_rows(in.v, kIn, op, "v"),
                {},
                {},
                {},
                {}};
  Problem<In, T>& p = call.problem;
  p.rule = delta ? Rule::kDelta : Rule::kAdditive;
  p.decay = decay_of(in.g, s, op, beside_q(in, op));
  p.sequences = {s.batch, s.tokens, nullptr};
  if (in.cu_seqlens.has_value()) {
    call.offsets = check_offsets(in, s, op);
    p.sequences = {call.offsets.size(0) - 1, s.tokens, data<int64_t>(call.offsets)};
  }
  p.heads = s.heads;
  p.value_heads = s.value_heads;
  p.key_size = s.key_size;
  p.value_size = s.value_size;
  p.scale = static_cast<T>(scale);
  p.q = rows_of<In>(call.q);
  p.k = rows_of<In>(call.k);
  p.v = rows_of<In>(call.v);
  check_beta(in, s, delta, op, beside_q(in, op));
  if (delta) {
    require(is_floating(in.beta->scalar_type()), op, ": beta has dtype ", dtype_name(in.beta->scalar_type()),
            ", needed float32, bfloat16, float16 or float64");
    call.beta = torch::stable::to(*in.beta, kWide);
    p.beta = rows_of<T>(call.beta);
  }
  if (p.decay == Decay::kNone) return call;
  if (p.decay == Decay::kChannel) {
    call.g = with_adjacent_rows(*in.g, kWide, op, "g");
    p.g = rows_of<T>(call.g);
    return call;
  }
  require(is_floating(in.g->scalar_type()), op, ": g has dtype ", dtype_name(in.g->scalar_type()),
          ", needed float32, bfloat16, float16 or float64");
  call.g = torch::stable::to(*in.g, kWide);
  p.g = in.g->dim() == 1 ? Rows<const T>{data<T>(call.g), 0, 0, call.g.stride(0)} : rows_of<T>(call.g);
  return call;
}

inline void require_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes, const char* op, const char* argument,
                          const std::vector<const char*>& letters) {
  const auto rank = static_cast<int64_t>(sizes.size());
  require(tensor.dim() == rank, op, ": ", argument, " has shape ", shape_of(tensor), ", needed ", rank, " dimensions");
  for (size_t d = 0; d < sizes.size(); ++d) {
    require_size(tensor, static_cast<int64_t>(d), sizes[d], op, argument, letters[d]);
  }
}

}  // namespace tilewright::torch_adapter::device_attention
