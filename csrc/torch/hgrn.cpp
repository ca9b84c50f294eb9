// SPDX-License-Identifier: Apache-2.0
// hgrn and its gradient as torch operators.
#include <tuple>

#include "core/memory.h"
#include "ops/hgrn/kernels.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter {
namespace {

struct Inputs {
  const Tensor& x;
  const Tensor& g;
  const std::optional<Tensor>& initial_state;
  const std::optional<Tensor>& cu_seqlens;
};

// The tensors keep alive what the problem points to.
template <class T>
struct Call {
  Tensor x, g, state;
  std::vector<int64_t> offsets;
  hgrn::Problem<T> problem;

  int64_t tasks() const { return problem.sequences * ceil_div(problem.width, hgrn::kChannels); }
};

template <class T>
Tensor contiguous_as(const Tensor& tensor, const char* op, const char* argument) {
  return torch::stable::contiguous(with_adjacent_rows(tensor, scalar_type_of<T>(), op, argument));
}

std::vector<int64_t> sequence_offsets(const Inputs& in, const char* op) {
  const int64_t batch = in.x.size(0), tokens = in.x.size(1);
  std::vector<int64_t> offsets;
  if (!in.cu_seqlens.has_value()) {
    for (int64_t b = 0; b <= batch; ++b) offsets.push_back(b * tokens);
    return offsets;
  }
  require(batch == 1, op, ": x has B = ", batch, " with cu_seqlens, needed B = 1: packed sequences lie one after the ",
          "other along T");
  require_dim(*in.cu_seqlens, 1, op, "cu_seqlens", "[N+1]");
  require(in.cu_seqlens->size(0) >= 1, op, ": cu_seqlens is empty, needed [N+1] offsets");
  const Tensor checked = offsets_of(*in.cu_seqlens, in.cu_seqlens->size(0) - 1, tokens, op);
  offsets.assign(data<int64_t>(checked), data<int64_t>(checked) + checked.numel());
  return offsets;
}

// state: a copy of the initial states, zero without one.
template <class T>
Call<T> check(const Inputs& in, const char* op) {
  require_cpu(in.x, op, "x");
  require_cpu(in.g, op, "g");
  require_dim(in.x, 3, op, "x", "[B, T, D]");
  require_dim(in.g, 3, op, "g", "[B, T, D]");
  for (int64_t d = 0; d < 3; ++d) require_size(in.g, d, in.x.size(d), op, "g", "that of x");
  const int64_t width = in.x.size(2);
  Call<T> call{contiguous_as<T>(in.x, op, "x"), contiguous_as<T>(in.g, op, "g"), {}, sequence_offsets(in, op), {}};
  const int64_t sequences = static_cast<int64_t>(call.offsets.size()) - 1;
  call.state = empty_cpu({sequences, width}, scalar_type_of<T>());
  if (in.initial_state.has_value()) {
    require_cpu(*in.initial_state, op, "initial_state");
    require_dim(*in.initial_state, 2, op, "initial_state", "[N, D]");
    require_size(*in.initial_state, 0, sequences, op, "initial_state", "N");
    require_size(*in.initial_state, 1, width, op, "initial_state", "D");
    const Tensor from = contiguous_as<T>(*in.initial_state, op, "initial_state");
    std::copy_n(data<T>(from), call.state.numel(), mutable_data<T>(call.state));
  } else {
    std::fill_n(mutable_data<T>(call.state), call.state.numel(), T{0});
  }
  call.problem = {sequences,       width,   call.offsets.data(),        data<T>(call.x),
                  data<T>(call.g), nullptr, mutable_data<T>(call.state)};
  return call;
}

// Like x, zero behind the last sequence.
template <class T>
Tensor output(const Call<T>& call) {
  const Tensor out = empty_cpu({call.x.size(0), call.x.size(1), call.x.size(2)}, scalar_type_of<T>());
  const int64_t used = call.offsets.back() * call.problem.width;
  std::fill(mutable_data<T>(out) + used, mutable_data<T>(out) + out.numel(), T{0});
  return out;
}

template <class T>
std::tuple<Tensor, Tensor> forward_as(const Inputs& in) {
  Call<T> call = check<T>(in, "hgrn");
  const Tensor h = output(call);
  call.problem.h = mutable_data<T>(h);
  const auto run = hgrn::kernels<T>().forward;
  run_tasks(call.tasks(), [&](int64_t task) { run(call.problem, task); });
  return {h, call.state};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward_as(const Inputs& in, const Tensor& h, const Tensor& d_h,
                                               const Tensor& d_state) {
  constexpr const char* kOp = "hgrn_backward";
  Call<T> call = check<T>(in, kOp);
  for (int64_t d = 0; d < 3; ++d) {
    require_size(h, d, in.x.size(d), kOp, "h", "that of x");
    require_size(d_h, d, in.x.size(d), kOp, "d_h", "that of x");
  }
  const Tensor outputs = contiguous_as<T>(h, kOp, "h"), from = contiguous_as<T>(d_h, kOp, "d_h");
  const Tensor d_final = contiguous_as<T>(d_state, kOp, "d_state");
  require(d_final.numel() == call.state.numel(), kOp, ": d_state has shape ", shape_of(d_state), ", needed [N, D]");
  const Tensor d_x = output(call), d_g = output(call);
  const Tensor carried = empty_cpu({call.state.size(0), call.state.size(1)}, scalar_type_of<T>());
  std::copy_n(data<T>(d_final), carried.numel(), mutable_data<T>(carried));
  call.problem.h = const_cast<T*>(data<T>(outputs));
  const hgrn::Gradients<T> gradients{data<T>(call.state), data<T>(from), mutable_data<T>(d_x), mutable_data<T>(d_g),
                                     mutable_data<T>(carried)};
  const auto run = hgrn::kernels<T>().backward;
  run_tasks(call.tasks(), [&](int64_t task) { run(call.problem, gradients, task); });
  return {d_x, d_g, carried};
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

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def("hgrn(Tensor x, Tensor g, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)");
  m.def(
      "hgrn_backward(Tensor x, Tensor g, Tensor? initial_state, Tensor? cu_seqlens, Tensor h, Tensor d_h, "
      "Tensor d_state) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("hgrn", TORCH_BOX(&forward));
  m.impl("hgrn_backward", TORCH_BOX(&backward));
}

}  // namespace tilewright::torch_adapter
