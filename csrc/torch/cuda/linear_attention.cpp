// SPDX-License-Identifier: Apache-2.0
// linear_attention and its decode step on the device.
#include "torch/cuda/linear_attention.h"

#include <tuple>

#include "ops/linear_attention/cuda/launch.h"

namespace tilewright::torch_adapter {
namespace {

using device_attention::Call;
using device_attention::Inputs;
using device_attention::Problem;
using device_attention::Wide;

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The initial state as the kernels read it; undefined without one.
template <class In>
Tensor initial(Call<In>& call, const Inputs& in, const std::optional<Tensor>& state, const char* op) {
  if (!state.has_value()) return {};
  require_same_device(*state, in.q, op, "initial_state");
  device_attention::require_sizes(*state, call.state_sizes(), op, "initial_state", {"N", "HV", "K", "V"});
  const Tensor ready = torch::stable::contiguous(torch::stable::to(*state, Call<In>::kWide));
  call.problem.initial = data<Wide<In>>(ready);
  return ready;
}

// The chunk form where the problem suits it and none asked for the other.
template <class In>
void run(const Problem<In, Wide<In>>& problem, bool recurrent, const Tensor& where) {
  namespace kernels = linear_attention::cuda;
  if constexpr (sizeof(Wide<In>) == sizeof(float) && !std::is_same_v<In, float>) {
    if (!recurrent && kernels::takes_chunks(problem)) {
      const Tensor memory = empty_on(where, {kernels::chunk_form_bytes(problem)}, ScalarType::Byte);
      kernels::launch_chunks(problem, mutable_data<char>(memory), stream_of(where));
      return;
    }
  }
  kernels::launch_recurrent(problem, stream_of(where));
}

template <class In>
FourTensors forward_as(const Inputs& in, const std::optional<Tensor>& initial_state, double scale, bool delta,
                       bool recurrent, bool save) {
  constexpr const char* kOp = "linear_attention";
  using T = Wide<In>;
  Call<In> call = device_attention::check<In>(in, scale, delta, kOp);
  const OnDevice guard(in.q);
  Problem<In, T>& p = call.problem;
  const Tensor before = initial(call, in, initial_state, kOp);
  const Tensor state = empty_on(in.q, call.state_sizes(), Call<In>::kWide);
  // Kernels zero the rows behind the last sequence, if there is one.
  const Tensor out = p.sequences.count > 0 ? empty_on(in.q, call.value_sizes(), Call<In>::kIn)
                                           : zeros_on(in.q, call.value_sizes(), Call<In>::kIn);
  p.out = device_attention::mutable_rows_of<In>(out);
  p.state = mutable_data<T>(state);
  p.slot_count = p.sequences.count;
  run<In>(p, recurrent, in.q);
  // The backward pass recomputes what it needs, from the initial states on.
  Tensor kept = empty_on(in.q, {0, p.value_heads, p.key_size, p.value_size}, Call<In>::kWide);
  if (save && p.initial != nullptr) kept = torch::stable::clone(before);
  const Tensor errors = empty_on(in.q, {0, 0, p.value_heads, p.value_size}, Call<In>::kWide);
  return {torch::stable::to(out, in.v.scalar_type()), state, kept, errors};
}

FourTensors forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& beta,
                    const std::optional<Tensor>& g, const std::optional<Tensor>& initial_state,
                    const std::optional<Tensor>& cu_seqlens, double scale, bool delta, bool recurrent, bool save) {
  const Inputs in{q, k, v, beta, g, cu_seqlens};
  return device_attention::for_type(
      in.type(), [&]<class In>() { return forward_as<In>(in, initial_state, scale, delta, recurrent, save); });
}

template <class In>
Tensor step_as(const Inputs& in, const Tensor& state, const std::optional<Tensor>& state_indices, double scale,
               bool delta) {
  constexpr const char* kOp = "linear_attention_step";
  Call<In> call = device_attention::check<In>(in, scale, delta, kOp);
  const OnDevice guard(in.q);
  auto& p = call.problem;
  require_same_device(state, in.q, kOp, "state");
  require_dtype(state, Call<In>::kWide, kOp, "state");
  require_dim(state, 4, kOp, "state", "[P, HV, K, V]");
  require_size(state, 1, p.value_heads, kOp, "state", "HV");
  require_size(state, 2, p.key_size, kOp, "state", "K");
  require_size(state, 3, p.value_size, kOp, "state", "V");
  require(state.is_contiguous(), kOp, ": state is updated in place and must be contiguous; call .contiguous() once");
  p.slot_count = state.size(0);
  Tensor slots;
  if (state_indices.has_value()) {
    require_same_device(*state_indices, in.q, kOp, "state_indices");
    require_dtype(*state_indices, ScalarType::Long, kOp, "state_indices");
    require_dim(*state_indices, 1, kOp, "state_indices", "[B]");
    require_size(*state_indices, 0, call.shape.batch, kOp, "state_indices", "B");
    slots = torch::stable::contiguous(*state_indices);
    p.slots = data<int64_t>(slots);
  } else {
    require(state.size(0) == call.shape.batch, kOp, ": state has P = ", state.size(0),
            " rows for B = ", call.shape.batch, " sequences; give as many, or state_indices");
  }
  const Tensor out = empty_on(in.q, call.value_sizes(), Call<In>::kIn);
  p.out = device_attention::mutable_rows_of<In>(out);
  p.state = mutable_data<Wide<In>>(state);
  p.initial = p.state;
  linear_attention::cuda::launch_recurrent(p, stream_of(in.q));
  return torch::stable::to(out, in.v.scalar_type());
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& beta,
            const std::optional<Tensor>& g, const Tensor& state, const std::optional<Tensor>& state_indices,
            double scale, bool delta) {
  const std::optional<Tensor> packed;
  const Inputs in{q, k, v, beta, g, packed};
  // States are float32: as on the CPU, float64 inputs are rounded.
  const ScalarType type = in.type() == ScalarType::Double ? ScalarType::Float : in.type();
  return device_attention::for_type(type,
                                    [&]<class In>() { return step_as<In>(in, state, state_indices, scale, delta); });
}

}  // namespace

TILEWRIGHT_DEVICE_OPERATORS(m) {
  m.impl("linear_attention", TORCH_BOX(&forward));
  m.impl("linear_attention_step", TORCH_BOX(&step));
}

}  // namespace tilewright::torch_adapter
