// SPDX-License-Identifier: Apache-2.0
// sparse_gated_mlp and its activation as torch operators.
#include <array>
#include <tuple>

#include "core/memory.h"
#include "ops/sparse_gated_mlp/kernels.h"
#include "ops/sparse_gated_mlp/plan.h"
#include "ops/sparse_gated_mlp/reference.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter {
namespace {

using sparse_gated_mlp::Function;

constexpr const char* kOp = "sparse_gated_mlp";
constexpr const char* kActivationOp = "cats_activation";
constexpr int64_t kValuesPerTask = 1 << 14;

Function function_of(const std::string& name, const char* op) {
  constexpr std::array<const char*, sparse_gated_mlp::kFunctions> kNames{"silu", "gelu", "gelu_tanh", "relu"};
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<Function>(i);
  }
  fail(op, ": act = '", name, "', needed silu, gelu, gelu_tanh or relu");
}

Tensor threshold_of(const Tensor& threshold, int64_t inner, const char* op) {
  require_cpu(threshold, op, "threshold");
  require(threshold.dim() == 0 || (threshold.dim() == 1 && (threshold.size(0) == 1 || threshold.size(0) == inner)), op,
          ": threshold has shape ", shape_of(threshold), ", needed [], [1] or [M] with M = ", inner);
  const Tensor values = as_float(threshold, op, "threshold");
  for (int64_t i = 0; i < values.numel(); ++i) {
    const float value = data<float>(values)[i];
    require(value >= 0.0f, op, ": threshold holds ", value, ", needed values of at least 0");
  }
  return values;
}

int64_t stride_of(const Tensor& threshold) { return threshold.numel() > 1 ? 1 : 0; }

std::tuple<Tensor, Tensor> cats_activation(const Tensor& x, const Tensor& threshold, std::string act) {
  require_cpu(x, kActivationOp, "x");
  require(x.dim() >= 1, kActivationOp, ": x is a scalar, needed [..., M]");
  const int64_t inner = x.size(x.dim() - 1);
  const Function function = function_of(act, kActivationOp);
  const Tensor limit = threshold_of(threshold, inner, kActivationOp);
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const Tensor kept = empty_cpu(sizes, ScalarType::Bool);
  auto* mask = mutable_data<uint8_t>(kept);
  const int64_t tokens = inner == 0 ? 0 : x.numel() / inner, stride = stride_of(limit);
  if (x.scalar_type() == ScalarType::Double) {
    const Tensor z = torch::stable::contiguous(x);
    Tensor a = empty_cpu(sizes, ScalarType::Double);
    for (int64_t i = 0; i < z.numel(); ++i) {
      const double value = sparse_gated_mlp::reference_activation(function, data<double>(z)[i]);
      mask[i] = sparse_gated_mlp::reference_kept(value, double{data<float>(limit)[i % inner * stride]});
      mutable_data<double>(a)[i] = mask[i] ? value : 0.0;
    }
    return {a, kept};
  }
  const Tensor z = as_float(x, kActivationOp, "x");
  Tensor a = empty_cpu(sizes, ScalarType::Float);
  const auto run = sparse_gated_mlp::activate();
  const int64_t per_task = std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(inner, 1));
  torch::stable::parallel_for(0, tokens, per_task, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      run(function, data<float>(z) + t * inner, data<float>(limit), stride, inner, mutable_data<float>(a) + t * inner,
          mask + t * inner);
    }
  });
  return {to_type(a, x.scalar_type()), kept};
}

struct Inputs {
  const Tensor &x, &gate, &up, &down, &threshold;
  const std::string& act;
  const std::optional<Tensor>&gate_bias, &up_bias, &down_bias;
};

int64_t inner_of(const Inputs& in) { return in.gate.size(0); }
int64_t hidden_of(const Inputs& in) { return in.gate.size(1); }

void check(const Inputs& in) {
  require_cpu(in.x, kOp, "x");
  require(in.x.dim() >= 1, kOp, ": x is a scalar, needed [..., D]");
  require(is_floating(in.x.scalar_type()), kOp, ": x has dtype ", dtype_name(in.x.scalar_type()),
          ", needed a floating type");
  require_cpu(in.gate, kOp, "w_gate");
  require_dim(in.gate, 2, kOp, "w_gate", "[M, D]");
  require_size(in.x, in.x.dim() - 1, hidden_of(in), kOp, "x", "D");
  const ScalarType type = in.gate.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Double, kOp,
          ": w_gate has dtype ", dtype_name(type),
          ", needed float32, bfloat16 or float64; convert the weights with .to()");
  for (const auto& [tensor, name] : {std::pair{&in.up, "w_up"}, std::pair{&in.down, "w_down_t"}}) {
    require_cpu(*tensor, kOp, name);
    require_dtype(*tensor, type, kOp, name);
    require_dim(*tensor, 2, kOp, name, "[M, D] (the down projection is passed transposed)");
    require_size(*tensor, 0, inner_of(in), kOp, name, "M");
    require_size(*tensor, 1, hidden_of(in), kOp, name, "D");
  }
}

// Contiguous in the wanted type, or an undefined tensor without a bias.
Tensor bias_of(const std::optional<Tensor>& bias, int64_t size, ScalarType type, const char* name) {
  if (!bias.has_value()) return {};
  require_cpu(*bias, kOp, name);
  require_dim(*bias, 1, kOp, name, "[M], or [D] for the down projection");
  require_size(*bias, 0, size, kOp, name, "its projection's outputs");
  require(is_floating(bias->scalar_type()), kOp, ": ", name, " has dtype ", dtype_name(bias->scalar_type()),
          ", needed a floating type");
  return contiguous_of(*bias, type);
}

// What a problem points to, kept alive; nothing is listed yet.
template <class Weight, class Real>
struct Call {
  Tensor x, gate, up, down, threshold, gate_bias, up_bias, down_bias, activation, kept, y;
  sparse_gated_mlp::Problem<Weight, Real> problem;

  explicit Call(const Inputs& in) {
    check(in);
    constexpr ScalarType type = scalar_type_of<Real>();
    const int64_t inner = inner_of(in), hidden = hidden_of(in);
    x = contiguous_of(in.x, type);
    gate = torch::stable::contiguous(in.gate);
    up = torch::stable::contiguous(in.up);
    down = torch::stable::contiguous(in.down);
    threshold = threshold_of(in.threshold, inner, kOp);
    gate_bias = bias_of(in.gate_bias, inner, type, "b_gate");
    up_bias = bias_of(in.up_bias, inner, type, "b_up");
    down_bias = bias_of(in.down_bias, hidden, type, "b_down");
    std::vector<int64_t> sizes(in.x.sizes().begin(), in.x.sizes().end());
    y = empty_cpu(sizes, type);
    int64_t tokens = 1;
    for (size_t d = 0; d + 1 < sizes.size(); ++d) tokens *= sizes[d];
    sizes.back() = inner;
    kept = empty_cpu(sizes, ScalarType::Bool);
    activation = empty_cpu({tokens, inner}, type);
    problem = {.tokens = tokens,
               .hidden = hidden,
               .inner = inner,
               .stride = hidden,
               .function = function_of(in.act, kOp),
               .x = data<Real>(x),
               .gate = data<Weight>(gate),
               .up = data<Weight>(up),
               .down = data<Weight>(down),
               .gate_bias = in.gate_bias.has_value() ? data<Real>(gate_bias) : nullptr,
               .up_bias = in.up_bias.has_value() ? data<Real>(up_bias) : nullptr,
               .down_bias = in.down_bias.has_value() ? data<Real>(down_bias) : nullptr,
               .threshold = data<float>(threshold),
               .threshold_stride = stride_of(threshold),
               .activation = mutable_data<Real>(activation),
               .kept = mutable_data<uint8_t>(kept),
               .rows = nullptr,
               .count = 0,
               .by_class = nullptr,
               .class_starts = nullptr,
               .h = nullptr,
               .y = mutable_data<Real>(y)};
  }
};

// Memory that a thread keeps from call to call.
struct Memory {
  Scratch needed, rows, by_class, h, workspace;
};

Memory& memory() {
  thread_local Memory mine;
  return mine;
}

// The rows that some token keeps.
template <class Problem>
int64_t count_needed(const Problem& p, uint8_t* needed) {
  std::copy_n(p.kept, p.inner, needed);
  for (int64_t t = 1; t < p.tokens; ++t) {
    for (int64_t j = 0; j < p.inner; ++j) needed[j] |= p.kept[t * p.inner + j];
  }
  int64_t count = 0;
  for (int64_t j = 0; j < p.inner; ++j) count += needed[j];
  return count;
}

// Up and down projections of the rows that are needed, or of all.
template <class Weight>
void multiply_rows(sparse_gated_mlp::Problem<Weight, float>& p, int64_t threads) {
  Memory& m = memory();
  auto* needed = m.needed.get<uint8_t>(std::max<int64_t>(p.inner, 1));
  const int64_t active = count_needed(p, needed);
  const auto plan = sparse_gated_mlp::choose_plan({p.tokens, p.hidden, p.inner, sizeof(Weight)}, active, threads);
  if (plan.dense) std::fill_n(needed, p.inner, uint8_t{1});
  std::array<int32_t, sparse_gated_mlp::kClasses + 1> starts{};
  auto* rows = m.rows.get<int32_t>(p.inner + 1);
  auto* by_class = m.by_class.get<int32_t>(p.inner + 1);
  p.count = sparse_gated_mlp::list_rows(needed, p.inner, rows, by_class, starts.data());
  p.rows = rows;
  p.by_class = by_class;
  p.class_starts = starts.data();
  p.h = m.h.get<float>(std::max<int64_t>(p.count * p.tokens, 1));
  const auto& kernels = sparse_gated_mlp::kernels<Weight>();
  run_tasks(plan.up_items,
            [&](int64_t item) { kernels.up(p, item * plan.up_rows, std::min(p.count, (item + 1) * plan.up_rows)); });
  const int64_t floats = sparse_gated_mlp::workspace_floats(p.tokens, plan.columns);
  run_tasks(plan.down_items, [&](int64_t item) {
    kernels.down(p, item * plan.columns, std::min(p.hidden, (item + 1) * plan.columns),
                 memory().workspace.get<float>(floats));
  });
}

template <class Weight>
std::tuple<Tensor, Tensor> run_float(const Inputs& in) {
  Call<Weight, float> call(in);
  auto& p = call.problem;
  if (p.tokens > 0 && p.hidden > 0) {
    const int64_t threads = torch::stable::get_num_threads();
    const auto plan = sparse_gated_mlp::choose_plan({p.tokens, p.hidden, p.inner, sizeof(Weight)}, p.inner, threads);
    const auto& kernels = sparse_gated_mlp::kernels<Weight>();
    run_tasks(plan.gate_items, [&](int64_t item) {
      kernels.gate(p, item * plan.gate_rows, std::min(p.inner, (item + 1) * plan.gate_rows));
    });
    multiply_rows(p, threads);
  }
  return {to_type(call.y, in.x.scalar_type()), call.kept};
}

std::tuple<Tensor, Tensor> run_double(const Inputs& in) {
  Call<double, double> call(in);
  sparse_gated_mlp::reference(call.problem);
  return {to_type(call.y, in.x.scalar_type()), call.kept};
}

std::tuple<Tensor, Tensor> sparse_gated_mlp_forward(const Tensor& x, const Tensor& w_gate, const Tensor& w_up,
                                                    const Tensor& w_down_t, const Tensor& threshold, std::string act,
                                                    const std::optional<Tensor>& b_gate,
                                                    const std::optional<Tensor>& b_up,
                                                    const std::optional<Tensor>& b_down) {
  const Inputs in{x, w_gate, w_up, w_down_t, threshold, act, b_gate, b_up, b_down};
  switch (w_gate.scalar_type()) {
    case ScalarType::BFloat16: return run_float<uint16_t>(in);
    case ScalarType::Double: return run_double(in);
    default: return run_float<float>(in);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def("cats_activation(Tensor x, Tensor threshold, str act) -> (Tensor, Tensor)");
  m.def(
      "sparse_gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor threshold, str act, "
      "Tensor? b_gate, Tensor? b_up, Tensor? b_down) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("cats_activation", TORCH_BOX(&cats_activation));
  m.impl("sparse_gated_mlp", TORCH_BOX(&sparse_gated_mlp_forward));
}

}  // namespace tilewright::torch_adapter
