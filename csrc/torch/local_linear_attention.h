// SPDX-License-Identifier: Apache-2.0
// What the adapters of local linear attention on the CPU and on a device check alike.
#pragma once

#include "ops/local_linear_attention/problem.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter::lla_checks {

namespace lla = local_linear_attention;
using lla::Options;
using lla::Shape;
using lla::Solver;

// Refuses a tensor that is not where the kernels run.
using Place = void (*)(const Tensor& tensor, const char* op, const char* argument);

inline ScalarType compute_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls run(T{}) with the type that the kernels compute in.
template <class Run>
auto dispatch(const Tensor& q, const Run& run) {
  return compute_type(q) == ScalarType::Double ? run(double{}) : run(float{});
}

inline Tensor dense(const Tensor& tensor, ScalarType type) { return contiguous_of(tensor, type); }

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

inline void require_type(Place place, const Tensor& tensor, const Tensor& q, const char* op, const char* argument) {
  place(tensor, op, argument);
  require(tensor.scalar_type() == q.scalar_type(), op, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
          ", but q has ", dtype_name(q.scalar_type()), "; convert one of them with .to()");
}

inline Shape shape_of_problem(Place place, const Tensor& q, const Tensor& k, const Tensor& v, const char* op) {
  place(q, op, "q");
  require(is_floating(q.scalar_type()), op, ": q has dtype ", dtype_name(q.scalar_type()),
          ", needed float32, bfloat16, float16 or float64");
  require_dim(q, 4, op, "q", "[B, T, HQ, K]");
  require_type(place, k, q, op, "k");
  require_dim(k, 4, op, "k", "[B, S, H, K]");
  require_type(place, v, q, op, "v");
  require_dim(v, 4, op, "v", "[B, S, H, V]");
  const Shape shape{q.size(2), k.size(2), q.size(3), v.size(3)};
  require(shape.key_size > 0, op, ": q has shape ", shape_of(q), ", needed K of at least 1");
  require_size(k, 0, q.size(0), op, "k", "B");
  require_size(k, 3, shape.key_size, op, "k", "K");
  require_size(v, 0, q.size(0), op, "v", "B");
  require_size(v, 1, k.size(1), op, "v", "S");
  require_size(v, 2, shape.kv_heads, op, "v", "H");
  require(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0, op, ": q has HQ = ", shape.heads,
          " heads, needed a multiple of k's H = ", shape.kv_heads);
  return shape;
}

inline Options options_of(double scale, bool causal, std::optional<int64_t> window, const char* op) {
  require(!window.has_value() || *window >= 1, op, ": window_size = ", window.value_or(0),
          ", needed at least 1, or None for no window");
  Options options{};
  options.scale = scale;
  options.causal = causal;
  options.window = window.value_or(lla::kNoWindow);
  options.solver = Solver::kGiven;
  return options;
}

struct SolverArguments {
  double rtol;
  int64_t max_iterations;
  const std::string& name;
  bool jacobi, absolute, ridge_grad;
};

inline void set_solver(Options& options, const SolverArguments& s, const char* op) {
  require(s.name == "cg" || s.name == "direct", op, ": solver = '", s.name, "', needed cg or direct");
  require(s.rtol >= 0.0, op, ": cg_rtol = ", s.rtol, ", needed a number of at least 0");
  require(s.max_iterations >= 1, op, ": cg_max_iters = ", s.max_iterations, ", needed at least 1");
  options.solver = s.name == "cg" ? Solver::kConjugateGradient : Solver::kCholesky;
  options.rtol = s.rtol;
  options.max_iterations = s.max_iterations;
  options.jacobi = s.jacobi;
  options.absolute = s.absolute;
  options.ridge_grad = s.ridge_grad;
}

inline Tensor checked_like_q(Place place, const Tensor& tensor, const Tensor& q, int64_t last, const char* op,
                             const char* argument) {
  place(tensor, op, argument);
  require_dim(tensor, 4, op, argument, "[B, T, HQ, .]");
  for (int64_t d = 0; d < 3; ++d) require_size(tensor, d, q.size(d), op, argument, "that of q");
  require_size(tensor, 3, last, op, argument, "the size of a head");
  require(is_floating(tensor.scalar_type()), op, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
          ", needed a floating type");
  return dense(tensor, compute_type(q));
}

}  // namespace tilewright::torch_adapter::lla_checks
