// SPDX-License-Identifier: Apache-2.0
// linear_attention (chunk and recurrent form), its gradient, and the decode step as torch operators.
#include <tuple>

#include "core/memory.h"
#include "ops/linear_attention/kernels.h"
#include "torch/linear_attention_checks.h"

namespace tilewright::torch_adapter {
namespace {

using attention_checks::check_beta;
using attention_checks::check_packing;
using attention_checks::check_shapes;
using attention_checks::decay_of;
using attention_checks::Inputs;
using attention_checks::mutable_rows_of;
using attention_checks::rows_of;
using attention_checks::Shape;
using linear_attention::Decay;
using linear_attention::Gradients;
using linear_attention::Problem;
using linear_attention::Rows;
using linear_attention::Rule;
using linear_attention::Sequences;

// Columns of a state below which sharing a head between threads does not pay.
constexpr int64_t kColumnsPerPart = 32;

// Of all heads that go through time together: half of a second-level cache of one megabyte.
constexpr int64_t kStateBytes = int64_t{1} << 19;

// Refuses tensors that are not on the CPU.
auto on_cpu(const char* op) {
  return [op](const Tensor& tensor, const char* argument) { require_cpu(tensor, op, argument); };
}

// A checked call. The tensors keep alive what the problem points to; outputs are yet to be set.
template <class T>
struct Call {
  Shape shape;
  Tensor q, k, v, beta, g, offsets;
  Problem<T> problem;

  int64_t sequences() const { return problem.sequences.count; }
  int64_t pairs() const { return sequences() * shape.value_heads; }   // of a sequence and a value head
  std::vector<int64_t> value_sizes() const { return {shape.batch, shape.tokens, shape.value_heads, shape.value_size}; }
  std::vector<int64_t> state_sizes() const {
    return {sequences(), shape.value_heads, shape.key_size, shape.value_size};
  }
};

template <class T>
Call<T> check(const Inputs& in, double scale, bool delta, const char* op) {
  constexpr ScalarType kType = scalar_type_of<T>();
  const Shape s = check_shapes(in, op, on_cpu(op));
  Call<T> call{s,
               with_adjacent_rows(in.q, kType, op, "q"),
               with_adjacent_rows(in.k, kType, op, "k"),
               with_adjacent_rows(in.v, kType, op, "v"),
               {},
               {},
               {},
               {}};
  Problem<T>& p = call.problem;
  p.rule = delta ? Rule::kDelta : Rule::kAdditive;
  p.decay = decay_of(in.g, s, op, on_cpu(op));
  p.sequences = {s.batch, s.tokens, nullptr};
  if (in.cu_seqlens.has_value()) {
    check_packing(*in.cu_seqlens, s, op);
    call.offsets = offsets_of(*in.cu_seqlens, in.cu_seqlens->size(0) - 1, s.tokens, op);
    p.sequences = {in.cu_seqlens->size(0) - 1, s.tokens, data<int64_t>(call.offsets)};
  }
  p.heads = s.heads;
  p.value_heads = s.value_heads;
  p.key_size = s.key_size;
  p.value_size = s.value_size;
  p.scale = static_cast<T>(scale);
  p.q = rows_of<T>(call.q);
  p.k = rows_of<T>(call.k);
  p.v = rows_of<T>(call.v);
  check_beta(in, s, delta, op, on_cpu(op));
  if (delta) {
    call.beta = to_type(*in.beta, kType);
    p.beta = rows_of<T>(call.beta);
  }
  if (p.decay == Decay::kNone) return call;
  call.g = with_adjacent_rows(*in.g, kType, op, "g");
  p.g = in.g->dim() == 1 ? Rows<const T>{data<T>(call.g), 0, 0, call.g.stride(0)} : rows_of<T>(call.g);
  return call;
}

void require_same_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes, const char* op, const char* argument,
                        const char* what) {
  const auto rank = static_cast<int64_t>(sizes.size());
  require(tensor.dim() == rank, op, ": ", argument, " has shape ", shape_of(tensor), ", needed ", rank, " dimensions");
  for (int64_t d = 0; d < rank; ++d) require_size(tensor, d, sizes[static_cast<size_t>(d)], op, argument, what);
}

// The states as they are before the first token.
template <class T>
Tensor initial(const Call<T>& call, const std::optional<Tensor>& state, const char* op) {
  const Tensor copy = empty_cpu(call.state_sizes(), scalar_type_of<T>());
  if (!state.has_value()) {
    std::fill_n(mutable_data<T>(copy), copy.numel(), T{0});
    return copy;
  }
  require_cpu(*state, op, "initial_state");
  require_dim(*state, 4, op, "initial_state", "[N, HV, K, V]");
  const auto wanted = call.state_sizes();
  for (int64_t d = 0; d < 4; ++d) {
    constexpr const char* kLetters[] = {"N", "HV", "K", "V"};
    require_size(*state, d, wanted[static_cast<size_t>(d)], op, "initial_state", kLetters[d]);
  }
  const Tensor source = contiguous_of(*state, scalar_type_of<T>());
  std::copy_n(data<T>(source), copy.numel(), mutable_data<T>(copy));
  return copy;
}

// [B, T, ...], zero in the rows behind the last sequence, which no task writes.
template <class T>
Tensor output(const Call<T>& call, const std::vector<int64_t>& sizes) {
  const Tensor out = empty_cpu(sizes, scalar_type_of<T>());
  const Sequences& sequences = call.problem.sequences;
  const int64_t used = sequences.offsets == nullptr ? call.shape.tokens : sequences.offsets[sequences.count];
  if (used < call.shape.tokens) {
    const int64_t row = out.numel() / call.shape.tokens;
    std::fill_n(mutable_data<T>(out) + used * row, (call.shape.tokens - used) * row, T{0});
  }
  return out;
}

// Where each sequence's kept states begin.
template <class T>
std::vector<int64_t> first_segments(const Problem<T>& p) {
  std::vector<int64_t> first(static_cast<size_t>(p.sequences.count) + 1, 0);
  for (int64_t n = 0; n < p.sequences.count; ++n) {
    const int64_t tokens = p.sequences.last(n) - p.sequences.first(n);
    first[static_cast<size_t>(n) + 1] =
        first[static_cast<size_t>(n)] + ceil_div(tokens, linear_attention::segment_tokens(p.decay));
  }
  return first;
}

// Chooses parts and band; returns the number of tasks.
template <class T>
int64_t share_between_threads(Problem<T>& p, int64_t pairs, bool chunks) {
  const int64_t threads = torch::stable::get_num_threads();
  if (pairs > 0 && pairs < threads) {
    p.parts = std::min(ceil_div(p.value_size, kColumnsPerPart), ceil_div(threads, pairs));
  } else if (chunks) {
    const int64_t cached = kStateBytes / (p.state_size() * static_cast<int64_t>(sizeof(T)));
    p.band = std::clamp<int64_t>(std::min(cached, pairs / threads), 1, p.value_heads);
  }
  return (chunks ? p.sequences.count * ceil_div(p.value_heads, p.band) : pairs) * p.parts;
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
FourTensors forward_as(const Inputs& in, const std::optional<Tensor>& initial_state, double scale, bool delta,
                       bool recurrent, bool save) {
  constexpr const char* kOp = "linear_attention";
  Call<T> call = check<T>(in, scale, delta, kOp);
  Problem<T>& p = call.problem;
  const Tensor state = initial(call, initial_state, kOp);
  const Tensor out = output(call, call.value_sizes());
  p.out = mutable_rows_of<T>(out);
  p.state = mutable_data<T>(state);
  const std::vector<int64_t> segments = save ? first_segments(p) : std::vector<int64_t>{0};
  constexpr ScalarType kType = scalar_type_of<T>();
  const Tensor checkpoints = empty_cpu({segments.back(), p.value_heads, p.key_size, p.value_size}, kType);
  const Tensor errors =
      save && delta ? output(call, call.value_sizes()) : empty_cpu({0, 0, p.value_heads, p.value_size}, kType);
  if (save) {
    p.checkpoints = mutable_data<T>(checkpoints);
    p.first_segment = segments.data();
    if (delta) p.errors = mutable_rows_of<T>(errors);
  }
  const auto& kernels = linear_attention::kernels<T>();
  // What the backward pass needs is kept by the chunk form.
  const bool chunks = !recurrent || save;
  const int64_t tasks = share_between_threads(p, call.pairs(), chunks);
  const auto run = chunks ? kernels.chunk : kernels.recurrent;
  run_tasks(tasks, [&](int64_t task) { run(p, task); });
  return {to_type(out, in.v.scalar_type()), state, checkpoints, errors};
}

bool wants_double(const Inputs& in) { return in.type() == ScalarType::Double; }

FourTensors forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& beta,
                    const std::optional<Tensor>& g, const std::optional<Tensor>& initial_state,
                    const std::optional<Tensor>& cu_seqlens, double scale, bool delta, bool recurrent, bool save) {
  const Inputs in{q, k, v, beta, g, cu_seqlens};
  return wants_double(in) ? forward_as<double>(in, initial_state, scale, delta, recurrent, save)
                          : forward_as<float>(in, initial_state, scale, delta, recurrent, save);
}

template <class T>
SixTensors backward_as(const Inputs& in, const Tensor& checkpoints, const Tensor& errors, const Tensor& d_out,
                       const Tensor& d_state, double scale, bool delta) {
  constexpr const char* kOp = "linear_attention_backward";
  constexpr ScalarType kType = scalar_type_of<T>();
  Call<T> call = check<T>(in, scale, delta, kOp);
  Problem<T>& p = call.problem;
  const std::vector<int64_t> segments = first_segments(p);
  const std::vector<int64_t> kept{segments.back(), p.value_heads, p.key_size, p.value_size};
  require_dtype(checkpoints, kType, kOp, "checkpoints");
  for (int64_t d = 0; d < 4; ++d) {
    require_size(checkpoints, d, kept[static_cast<size_t>(d)], kOp, "checkpoints",
                 "what linear_attention kept with save");
  }
  require(checkpoints.is_contiguous(), kOp, ": checkpoints must be contiguous");
  p.checkpoints = const_cast<T*>(data<T>(checkpoints));
  p.first_segment = segments.data();
  if (delta) {
    require_dtype(errors, kType, kOp, "errors");
    require_same_sizes(errors, call.value_sizes(), kOp, "errors", "that of v");
    const Rows<const T> rows = rows_of<T>(errors);
    p.errors = {const_cast<T*>(rows.data), rows.batch, rows.token, rows.head};
  }
  const auto wanted = call.value_sizes();
  require_same_sizes(d_out, wanted, kOp, "d_out", "that of v");

  const Tensor from = with_adjacent_rows(d_out, kType, kOp, "d_out");
  const Tensor state = initial(call, d_state, kOp);
  const Shape& s = call.shape;
  const std::vector<int64_t> by_token{s.batch, s.tokens, s.value_heads};
  const std::vector<int64_t> by_channel{s.batch, s.tokens, s.value_heads, s.key_size};
  const Tensor dq = output(call, by_channel), dk = output(call, by_channel), dv = output(call, wanted);
  const Tensor dbeta = delta ? output(call, by_token) : empty_cpu({0}, kType);
  const Tensor dg = p.decay == Decay::kNone ? empty_cpu({0}, kType)
                                            : output(call, p.decay == Decay::kChannel ? by_channel : by_token);
  Gradients<T> gradients{};
  gradients.d_out = rows_of<T>(from);
  gradients.d_state = mutable_data<T>(state);
  gradients.dq = mutable_rows_of<T>(dq);
  gradients.dk = mutable_rows_of<T>(dk);
  gradients.dv = mutable_rows_of<T>(dv);
  if (delta) gradients.dbeta = mutable_rows_of<T>(dbeta);
  if (p.decay != Decay::kNone) gradients.dg = mutable_rows_of<T>(dg);
  const auto run = linear_attention::kernels<T>().backward;
  run_tasks(call.pairs(), [&](int64_t task) { run(p, gradients, task); });
  return {dq, dk, dv, dbeta, dg, state};
}

SixTensors backward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& beta,
                    const std::optional<Tensor>& g, const std::optional<Tensor>& cu_seqlens, const Tensor& checkpoints,
                    const Tensor& errors, const Tensor& d_out, const Tensor& d_state, double scale, bool delta) {
  const Inputs in{q, k, v, beta, g, cu_seqlens};
  return wants_double(in) ? backward_as<double>(in, checkpoints, errors, d_out, d_state, scale, delta)
                          : backward_as<float>(in, checkpoints, errors, d_out, d_state, scale, delta);
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& beta,
            const std::optional<Tensor>& g, const Tensor& state, const std::optional<Tensor>& state_indices,
            double scale, bool delta) {
  constexpr const char* kOp = "linear_attention_step";
  const std::optional<Tensor> packed;
  Call<float> call = check<float>({q, k, v, beta, g, packed}, scale, delta, kOp);
  Problem<float>& p = call.problem;
  require_cpu(state, kOp, "state");
  require_dtype(state, ScalarType::Float, kOp, "state");
  require_dim(state, 4, kOp, "state", "[P, HV, K, V]");
  require_size(state, 1, p.value_heads, kOp, "state", "HV");
  require_size(state, 2, p.key_size, kOp, "state", "K");
  require_size(state, 3, p.value_size, kOp, "state", "V");
  require(state.is_contiguous(), kOp, ": state is updated in place and must be contiguous; call .contiguous() once");
  Tensor slots;
  if (state_indices.has_value()) {
    require_cpu(*state_indices, kOp, "state_indices");
    require_dtype(*state_indices, ScalarType::Long, kOp, "state_indices");
    require_dim(*state_indices, 1, kOp, "state_indices", "[B]");
    require_size(*state_indices, 0, call.shape.batch, kOp, "state_indices", "B");
    slots = torch::stable::contiguous(*state_indices);
    p.slots = data<int64_t>(slots);
    std::vector<bool> taken(static_cast<size_t>(state.size(0)), false);
    for (int64_t n = 0; n < call.shape.batch; ++n) {
      require(p.slots[n] >= 0 && p.slots[n] < state.size(0), kOp, ": state_indices[", n, "] = ", p.slots[n],
              ", needed a row of state, 0 to ", state.size(0) - 1);
      require(!taken[static_cast<size_t>(p.slots[n])], kOp, ": state_indices names row ", p.slots[n],
              " twice; two sequences cannot share a state");
      taken[static_cast<size_t>(p.slots[n])] = true;
    }
  } else {
    require(state.size(0) == call.shape.batch, kOp, ": state has P = ", state.size(0),
            " rows for B = ", call.shape.batch, " sequences; give as many, or state_indices");
  }
  const Tensor out = empty_cpu(call.value_sizes(), ScalarType::Float);
  p.out = mutable_rows_of<float>(out);
  p.state = mutable_data<float>(state);
  const auto run = linear_attention::kernels<float>().recurrent;
  run_tasks(call.pairs(), [&](int64_t task) { run(p, task); });
  return to_type(out, v.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? initial_state, "
      "Tensor? cu_seqlens, float scale, bool delta, bool recurrent, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? cu_seqlens, "
      "Tensor checkpoints, Tensor errors, Tensor d_out, Tensor d_state, float scale, bool delta) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor(a!) state, "
      "Tensor? state_indices, float scale, bool delta) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&forward));
  m.impl("linear_attention_backward", TORCH_BOX(&backward));
  m.impl("linear_attention_step", TORCH_BOX(&step));
}

}  // namespace tilewright::torch_adapter
