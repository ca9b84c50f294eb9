// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward adapter of linear attention share: checks, and the problem as the kernels read it.
#pragma once

#include <type_traits>

#include "ops/linear_attention/cuda/problem.h"
#include "torch/cuda/device.h"

namespace tilewright::torch_adapter::device_attention {

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

struct Inputs {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const std::optional<Tensor>& beta;
  const std::optional<Tensor>& g;
  const std::optional<Tensor>& cu_seqlens;

  // That of q, k and v where they agree, else one that holds them all.
  ScalarType type() const {
    const ScalarType a = q.scalar_type(), b = k.scalar_type(), c = v.scalar_type();
    if (a == ScalarType::Double || b == ScalarType::Double || c == ScalarType::Double) return ScalarType::Double;
    return a == b && a == c && (a == ScalarType::BFloat16 || a == ScalarType::Half) ? a : ScalarType::Float;
  }
};

// Calls function<In>() for the type that inputs are stored in.
template <class Function>
auto for_type(ScalarType type, const Function& function) {
  if (type == ScalarType::BFloat16) return function.template operator()<hopper::bf16>();
  if (type == ScalarType::Half) return function.template operator()<hopper::f16>();
  if (type == ScalarType::Double) return function.template operator()<double>();
  return function.template operator()<float>();
}

struct Shape {
  int64_t batch, tokens, heads, value_heads, key_size, value_size;
};

inline Shape check_shapes(const Inputs& in, const char* op) {
  require_device(in.q, op, "q");
  require_same_device(in.k, in.q, op, "k");
  require_same_device(in.v, in.q, op, "v");
  require_dim(in.q, 4, op, "q", "[B, T, H, K]");
  require_dim(in.k, 4, op, "k", "[B, T, H, K]");
  require_dim(in.v, 4, op, "v", "[B, T, HV, V]");
  const Shape s{in.q.size(0), in.q.size(1), in.q.size(2), in.v.size(2), in.q.size(3), in.v.size(3)};
  for (int64_t d = 0; d < 4; ++d) require_size(in.k, d, in.q.size(d), op, "k", "that of q");
  require_size(in.v, 0, s.batch, op, "v", "B");
  require_size(in.v, 1, s.tokens, op, "v", "T");
  require(s.heads >= 1 && s.key_size >= 1, op, ": q has shape ", shape_of(in.q), ", needed H >= 1 and K >= 1");
  require(s.value_heads >= 1 && s.value_size >= 1, op, ": v has shape ", shape_of(in.v), ", needed HV >= 1 and V >= 1");
  require(s.value_heads % s.heads == 0, op, ": v has HV = ", s.value_heads,
          " heads, needed a multiple of q's H = ", s.heads, "; repeat the values, or give q and k fewer heads");
  return s;
}

inline void check_gate(const Tensor& gate, const Inputs& in, const Shape& s, const char* op, const char* argument) {
  require_same_device(gate, in.q, op, argument);
  require_size(gate, 0, s.batch, op, argument, "B");
  require_size(gate, 1, s.tokens, op, argument, "T");
  require_size(gate, 2, s.value_heads, op, argument, "HV");
}

inline Decay decay_of(const Inputs& in, const Shape& s, const char* op) {
  if (!in.g.has_value()) return Decay::kNone;
  const Tensor& g = *in.g;
  if (g.dim() == 1) {
    require_same_device(g, in.q, op, "g");
    require_size(g, 0, s.value_heads, op, "g", "HV");
    return Decay::kToken;
  }
  require(g.dim() == 3 || g.dim() == 4, op, ": g has shape ", shape_of(g),
          ", needed [HV], [B, T, HV] or [B, T, HV, K]");
  check_gate(g, in, s, op, "g");
  if (g.dim() == 3) return Decay::kToken;
  require_size(g, 3, s.key_size, op, "g", "K");
  return Decay::kChannel;
}

template <class T>
Rows<const T> rows_of(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <class T>
Rows<T> mutable_rows_of(const Tensor& tensor) {
  return {mutable_data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
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
  require(s.batch == 1, op, ": q has B = ", s.batch,
          " with cu_seqlens, needed B = 1: packed sequences lie one after the other along T");
  require_dim(offsets, 1, op, "cu_seqlens", "[N+1]");
  require(offsets.size(0) >= 1, op, ": cu_seqlens is empty, needed [N+1] offsets");
  const ScalarType type = offsets.scalar_type();
  require(type == ScalarType::Long || type == ScalarType::Int, op, ": cu_seqlens has dtype ", dtype_name(type),
          ", needed int64 or int32");
  return torch::stable::contiguous(torch::stable::to(offsets, ScalarType::Long));
}

template <class In>
Call<In> check(const Inputs& in, double scale, bool delta, const char* op) {
  using T = Wide<In>;
  constexpr ScalarType kIn = storage_type<In>(), kWide = scalar_type_of<T>();
  const Shape s = check_shapes(in, op);
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
  p.decay = decay_of(in, s, op);
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
  if (delta) {
    require(in.beta.has_value(), op, ": beta is missing, needed [B, T, HV] for the delta rule");
    require_dim(*in.beta, 3, op, "beta", "[B, T, HV]");
    check_gate(*in.beta, in, s, op, "beta");
    require(is_floating(in.beta->scalar_type()), op, ": beta has dtype ", dtype_name(in.beta->scalar_type()),
            ", needed float32, bfloat16, float16 or float64");
    call.beta = torch::stable::to(*in.beta, kWide);
    p.beta = rows_of<T>(call.beta);
  } else {
    require(!in.beta.has_value(), op, ": beta is given, but only the delta rule has one; pass None or rule='delta'");
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
