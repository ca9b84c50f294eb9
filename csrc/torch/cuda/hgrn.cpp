// SPDX-License-Identifier: Apache-2.0
// hgrn and its gradient on the device.
#include <tuple>

#include "ops/hgrn/cuda/launch.h"
#include "torch/cuda/device.h"

namespace tilewright::torch_adapter {
namespace {

using hgrn::cuda::Gradients;
using hgrn::cuda::Problem;

struct Inputs {
  const Tensor& x;
  const Tensor& g;
  const std::optional<Tensor>& initial_state;
  const std::optional<Tensor>& cu_seqlens;
};

// The tensors keep alive what the problem points to.
template <class T>
struct Call {
  Tensor x, g, initial, offsets;
  Problem<T> problem;

  Tensor like_x() const {
    const std::vector<int64_t> sizes{x.size(0), x.size(1), x.size(2)};
    // Kernels zero the rows behind the last sequence, if there is one.
    return problem.sequences > 0 ? empty_on(x, sizes, scalar_type_of<T>()) : zeros_on(x, sizes, scalar_type_of<T>());
  }
  Tensor states() const { return empty_on(x, {problem.sequences, problem.width}, scalar_type_of<T>()); }
};

template <class T>
Tensor contiguous_as(const Tensor& tensor, const Tensor& where, const char* op, const char* argument) {
  require_same_device(tensor, where, op, argument);
  return torch::stable::contiguous(with_adjacent_rows(tensor, scalar_type_of<T>(), op, argument));
}

// What the offsets say is read by kernels only: on the host it would cost a wait for the device.
Tensor check_offsets(const Inputs& in, const char* op) {
  const Tensor& offsets = *in.cu_seqlens;
  require_same_device(offsets, in.x, op, "cu_seqlens");
  require(in.x.size(0) == 1, op, ": x has B = ", in.x.size(0),
          " with cu_seqlens, needed B = 1: packed sequences lie one after the other along T");
  require_dim(offsets, 1, op, "cu_seqlens", "[N+1]");
  require(offsets.size(0) >= 1, op, ": cu_seqlens is empty, needed [N+1] offsets");
  const ScalarType type = offsets.scalar_type();
  require(type == ScalarType::Long || type == ScalarType::Int, op, ": cu_seqlens has dtype ", dtype_name(type),
          ", needed int64 or int32");
  return torch::stable::contiguous(torch::stable::to(offsets, ScalarType::Long));
}

template <class T>
Call<T> check(const Inputs& in, const char* op) {
  require_device(in.x, op, "x");
  require_dim(in.x, 3, op, "x", "[B, T, D]");
  require_dim(in.g, 3, op, "g", "[B, T, D]");
  for (int64_t d = 0; d < 3; ++d) require_size(in.g, d, in.x.size(d), op, "g", "that of x");
  Call<T> call{contiguous_as<T>(in.x, in.x, op, "x"), contiguous_as<T>(in.g, in.x, op, "g"), {}, {}, {}};
  Problem<T>& p = call.problem;
  p.sequences = in.x.size(0);
  p.tokens = in.x.size(1);
  p.width = in.x.size(2);
  if (in.cu_seqlens.has_value()) {
    call.offsets = check_offsets(in, op);
    p.sequences = call.offsets.size(0) - 1;
    p.offsets = data<int64_t>(call.offsets);
  }
  p.x = data<T>(call.x);
  p.g = data<T>(call.g);
  if (!in.initial_state.has_value()) return call;
  require_dim(*in.initial_state, 2, op, "initial_state", "[N, D]");
  require_size(*in.initial_state, 0, p.sequences, op, "initial_state", "N");
  require_size(*in.initial_state, 1, p.width, op, "initial_state", "D");
  call.initial = contiguous_as<T>(*in.initial_state, in.x, op, "initial_state");
  p.initial = data<T>(call.initial);
  return call;
}

template <class T>
std::tuple<Tensor, Tensor> forward_as(const Inputs& in) {
  Call<T> call = check<T>(in, "hgrn");
  const OnDevice guard(in.x);
  const Tensor h = call.like_x(), state = call.states();
  call.problem.h = mutable_data<T>(h);
  call.problem.state = mutable_data<T>(state);
  hgrn::cuda::launch_forward(call.problem, stream_of(in.x));
  return {h, state};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward_as(const Inputs& in, const Tensor& h, const Tensor& d_h,
                                               const Tensor& d_state) {
  constexpr const char* kOp = "hgrn_backward";
  Call<T> call = check<T>(in, kOp);
  const OnDevice guard(in.x);
  require_dim(h, 3, kOp, "h", "[B, T, D]");
  require_dim(d_h, 3, kOp, "d_h", "[B, T, D]");
  for (int64_t d = 0; d < 3; ++d) {
    require_size(h, d, in.x.size(d), kOp, "h", "that of x");
    require_size(d_h, d, in.x.size(d), kOp, "d_h", "that of x");
  }
  require_dim(d_state, 2, kOp, "d_state", "[N, D]");
  require_size(d_state, 0, call.problem.sequences, kOp, "d_state", "N");
  require_size(d_state, 1, call.problem.width, kOp, "d_state", "D");
  const Tensor outputs = contiguous_as<T>(h, in.x, kOp, "h"), from = contiguous_as<T>(d_h, in.x, kOp, "d_h");
  const Tensor d_final = contiguous_as<T>(d_state, in.x, kOp, "d_state");
  const Tensor d_x = call.like_x(), d_g = call.like_x(), d_initial = call.states();
  // Read only, by the backward kernel.
  call.problem.h = const_cast<T*>(data<T>(outputs));
  const Gradients<T> gradients{data<T>(from), data<T>(d_final), mutable_data<T>(d_x), mutable_data<T>(d_g),
                               mutable_data<T>(d_initial)};
  hgrn::cuda::launch_backward(call.problem, gradients, stream_of(in.x));
  return {d_x, d_g, d_initial};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& g, const std::optional<Tensor>& initial_state,
                                   const std::optional<Tensor>& cu_seqlens) {
  const Inputs in{x, g, initial_state, cu_seqlens};
  return x.scalar_type() == ScalarType::Double ? forward_as<double>(in) : forward_as<float>(in);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& x, const Tensor& g,
                                            const std::optional<Tensor>& initial_state,
                                            const std::optional<Tensor>& cu_seqlens, const Tensor& h, const Tensor& d_h,
                                            const Tensor& d_state) {
  const Inputs in{x, g, initial_state, cu_seqlens};
  return x.scalar_type() == ScalarType::Double ? backward_as<double>(in, h, d_h, d_state)
                                               : backward_as<float>(in, h, d_h, d_state);
}

}  // namespace

TILEWRIGHT_DEVICE_OPERATORS(m) {
  m.impl("hgrn", TORCH_BOX(&forward));
  m.impl("hgrn_backward", TORCH_BOX(&backward));
}

}  // namespace tilewright::torch_adapter
