// SPDX-License-Identifier: Apache-2.0
// What linear attention asks of its tensors on any device. `place(tensor, argument)` refuses a tensor that is elsewhere.
#pragma once

#include "ops/linear_attention/problem.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter::attention_checks {

using linear_attention::Decay;
using linear_attention::Rows;

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

struct Shape {
  int64_t batch, tokens, heads, value_heads, key_size, value_size;
};

template <class Place>
Shape check_shapes(const Inputs& in, const char* op, const Place& place) {
  place(in.q, "q");
  place(in.k, "k");
  place(in.v, "v");
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

template <class Place>
void check_gate(const Tensor& gate, const Shape& s, const char* op, const char* argument, const Place& place) {
  place(gate, argument);
  require_size(gate, 0, s.batch, op, argument, "B");
  require_size(gate, 1, s.tokens, op, argument, "T");
  require_size(gate, 2, s.value_heads, op, argument, "HV");
}

template <class Place>
Decay decay_of(const std::optional<Tensor>& g, const Shape& s, const char* op, const Place& place) {
  if (!g.has_value()) return Decay::kNone;
  if (g->dim() == 1) {
    place(*g, "g");
    require_size(*g, 0, s.value_heads, op, "g", "HV");
    return Decay::kToken;
  }
  require(g->dim() == 3 || g->dim() == 4, op, ": g has shape ", shape_of(*g),
          ", needed [HV], [B, T, HV] or [B, T, HV, K]");
  check_gate(*g, s, op, "g", place);
  if (g->dim() == 3) return Decay::kToken;
  require_size(*g, 3, s.key_size, op, "g", "K");
  return Decay::kChannel;
}

// That beta is there where the rule has one, and only there.
template <class Place>
void check_beta(const Inputs& in, const Shape& s, bool delta, const char* op, const Place& place) {
  if (!delta) {
    require(!in.beta.has_value(), op, ": beta is given, but only the delta rule has one; pass None or rule='delta'");
    return;
  }
  require(in.beta.has_value(), op, ": beta is missing, needed [B, T, HV] for the delta rule");
  require_dim(*in.beta, 3, op, "beta", "[B, T, HV]");
  check_gate(*in.beta, s, op, "beta", place);
}

// That there is one row of packed sequences, and an offset before and behind each.
inline void check_packing(const Tensor& cu_seqlens, const Shape& s, const char* op) {
  require(s.batch == 1, op, ": q has B = ", s.batch,
          " with cu_seqlens, needed B = 1: packed sequences lie one after the other along T");
  require_dim(cu_seqlens, 1, op, "cu_seqlens", "[N+1]");
  require(cu_seqlens.size(0) >= 1, op, ": cu_seqlens is empty, needed [N+1] offsets");
}

template <class T>
Rows<const T> rows_of(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <class T>
Rows<T> mutable_rows_of(const Tensor& tensor) {
  return {mutable_data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

}  // namespace tilewright::torch_adapter::attention_checks
