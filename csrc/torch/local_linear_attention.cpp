// SPDX-License-Identifier: Apache-2.0
// Local linear attention and Parallax as torch operators.
#include "torch/local_linear_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/local_linear_attention/kernels.h"
#include "ops/local_linear_attention/reference.h"

namespace tilewright::torch_adapter {
namespace {

namespace lla = local_linear_attention;
using lla::Options;
using lla::Plan;
using lla::Segment;
using lla::Shape;
using lla::Solver;
using namespace lla_checks;

std::vector<int64_t> integers(const Tensor& tensor, const char* op, const char* argument) {
  require_cpu(tensor, op, argument);
  require(tensor.scalar_type() == ScalarType::Long || tensor.scalar_type() == ScalarType::Int, op, ": ", argument,
          " has dtype ", dtype_name(tensor.scalar_type()), ", needed int64 or int32");
  require(tensor.dim() == 1, op, ": ", argument, " has shape ", shape_of(tensor), ", needed one dimension");
  const Tensor wide = dense(tensor, ScalarType::Long);
  return {data<int64_t>(wide), data<int64_t>(wide) + wide.numel()};
}

std::vector<Segment> packed_segments(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens, const char* op) {
  const std::vector<int64_t> offsets = integers(cu_seqlens, op, "cu_seqlens");
  require(q.size(0) == 1 && k.size(1) == q.size(1), op, ": q has shape ", shape_of(q), " and k ", shape_of(k),
          "; with cu_seqlens needed B = 1 and S = T");
  require(!offsets.empty() && offsets.front() == 0, op, ": cu_seqlens must begin with 0");
  std::vector<Segment> segments;
  for (size_t s = 0; s + 1 < offsets.size(); ++s) {
    const int64_t count = offsets[s + 1] - offsets[s];
    require(count >= 0, op, ": cu_seqlens falls from ", offsets[s], " to ", offsets[s + 1], "; offsets must not fall");
    segments.push_back({offsets[s], count, offsets[s], count});
  }
  require(offsets.back() <= q.size(1), op, ": cu_seqlens ends at ", offsets.back(), ", needed at most T = ", q.size(1));
  return segments;
}

std::vector<Segment> segments_of(const Tensor& q, const Tensor& k, const std::optional<Tensor>& cu_seqlens,
                                 const std::optional<Tensor>& lengths, bool causal, const char* op) {
  if (cu_seqlens.has_value()) return packed_segments(q, k, *cu_seqlens, op);
  const int64_t batch = q.size(0), queries = q.size(1), keys = k.size(1);
  std::vector<int64_t> held(static_cast<size_t>(batch), keys);
  if (lengths.has_value()) {
    held = integers(*lengths, op, "cache_lens");
    require_size(*lengths, 0, batch, op, "cache_lens", "B");
  }
  std::vector<Segment> segments;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = held[static_cast<size_t>(b)];
    require(length >= 0 && length <= keys, op, ": sequence ", b, " has a length of ", length,
            ", needed 0 to the cache's ", keys);
    require(!causal || length >= queries, op, ": sequence ", b, " has ", queries, " queries and ", length,
            " keys; a causal query needs its own key: append the keys and values first, or pass causal=False");
    segments.push_back({b * queries, queries, b * keys, length});
  }
  return segments;
}

// Smallest number of keys that a row sees.
int64_t fewest_keys(const std::vector<Segment>& segments, const Options& options) {
  int64_t fewest = lla::kNoWindow;
  for (const Segment& s : segments) {
    if (s.queries == 0) continue;
    const int64_t position = options.causal ? s.keys - s.queries : s.keys - 1;
    fewest = std::min({fewest, position + 1, options.window});
  }
  return fewest;
}

template <class T>
void require_positive(const Tensor& ridge, const std::vector<Segment>& segments, const Options& options,
                      int64_t key_size, const char* op) {
  const T* values = data<T>(ridge);
  const bool negative = std::any_of(values, values + ridge.numel(), [](T x) { return x < T{0}; });
  require(!negative, op, ": ridge_lambda has a negative entry; every entry must be positive");
  if (std::none_of(values, values + ridge.numel(), [](T x) { return x == T{0}; })) return;
  require(options.solver == Solver::kCholesky, op, ": ridge_lambda has an entry 0, which conjugate gradients cannot",
          " solve; pass a positive one or solver='direct'");
  require(fewest_keys(segments, options) > key_size, op, ": ridge_lambda has an entry 0, but a query sees ",
          fewest_keys(segments, options), " keys, needed more than K = ", key_size, "; pass a positive one");
}

Tensor checked_ridge(const Tensor& ridge, const Tensor& q, const std::vector<Segment>& segments, const Options& options,
                     const char* op) {
  require_cpu(ridge, op, "ridge_lambda");
  require_dim(ridge, 3, op, "ridge_lambda", "[B, T, HQ]");
  for (int64_t d = 0; d < 3; ++d) require_size(ridge, d, q.size(d), op, "ridge_lambda", "that of q");
  const Tensor values = dense(ridge, compute_type(q));
  dispatch(q, [&](auto zero) { require_positive<decltype(zero)>(values, segments, options, q.size(3), op); });
  return values;
}

// Zeros behind the last packed sequence, where no kernel writes.
void clear_rest(const Tensor& tensor, const std::vector<Segment>& segments, bool packed) {
  if (!packed || tensor.numel() == 0) return;
  const int64_t used = segments.empty() ? 0 : segments.back().first_query + segments.back().queries;
  const int64_t row = tensor.numel() / tensor.size(1) * static_cast<int64_t>(tensor.element_size());
  std::memset(mutable_data<uint8_t>(tensor) + used * row, 0, static_cast<size_t>((tensor.size(1) - used) * row));
}

struct ForwardResult {
  Tensor o, x, rows, iterations;
};

struct Call {
  Tensor q, k, v;   // as the kernels read them
  Shape shape;
  std::vector<Segment> segments;
  bool packed;
};

Call open(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cu_seqlens,
          const std::optional<Tensor>& lengths, bool causal, const char* op) {
  const Shape shape = shape_of_problem(require_cpu, q, k, v, op);
  const ScalarType type = compute_type(q);
  return {
      dense(q, type),        dense(k, type), dense(v, type), shape, segments_of(q, k, cu_seqlens, lengths, causal, op),
      cu_seqlens.has_value()};
}

template <class T>
ForwardResult run_forward(const Call& call, const Options& options, const Tensor* ridge, const Tensor* start) {
  const ScalarType type = compute_type(call.q);
  std::vector<int64_t> sizes = sizes_of(call.q);
  ForwardResult result;
  lla::Forward<T> problem{};
  if (options.solver != Solver::kGiven) {
    result.x = empty_cpu(sizes, type);
    result.iterations = empty_cpu({sizes[0], sizes[1], sizes[2]}, ScalarType::Int);
    result.rows = empty_cpu({sizes[0], sizes[1], sizes[2], lla::RowRecord::kSize}, type);
    for (const Tensor* tensor : {&result.x, &result.iterations, &result.rows}) {
      clear_rest(*tensor, call.segments, call.packed);
    }
    problem.x = mutable_data<T>(result.x);
    problem.rows = mutable_data<T>(result.rows);
    problem.iterations = mutable_data<int32_t>(result.iterations);
    problem.ridge = data<T>(*ridge);
  }
  sizes[3] = call.shape.value_size;
  result.o = empty_cpu(sizes, type);
  clear_rest(result.o, call.segments, call.packed);
  problem.shape = call.shape;
  problem.options = options;
  problem.q = data<T>(call.q);
  problem.k = data<T>(call.k);
  problem.v = data<T>(call.v);
  problem.start = start == nullptr ? nullptr : data<T>(*start);
  problem.o = mutable_data<T>(result.o);
  const Plan plan = lla::choose_plan(call.shape, call.segments);
  const auto run = lla::kernels<T>().forward;
  torch::stable::parallel_for(0, plan.blocks, 1, [&](int64_t first, int64_t last) { run(problem, plan, first, last); });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lla_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                       const Tensor& ridge, const std::optional<Tensor>& start,
                                                       const std::optional<Tensor>& cu_seqlens,
                                                       const std::optional<Tensor>& lengths, double scale, bool causal,
                                                       std::optional<int64_t> window, double rtol,
                                                       int64_t max_iterations, std::string solver, bool jacobi,
                                                       bool absolute, bool ridge_grad) {
  const char* op = lengths.has_value() ? "lla_decode" : "lla_attention";
  const Call call = open(q, k, v, cu_seqlens, lengths, causal, op);
  Options options = options_of(scale, causal, window, op);
  set_solver(options, {rtol, max_iterations, solver, jacobi, absolute, ridge_grad}, op);
  const Tensor lambda = checked_ridge(ridge, q, call.segments, options, op);
  Tensor begin;
  if (start.has_value()) begin = checked_like_q(require_cpu, *start, q, call.shape.key_size, op, "rho_init");
  const ForwardResult result = dispatch(q, [&](auto zero) {
    return run_forward<decltype(zero)>(call, options, &lambda, start.has_value() ? &begin : nullptr);
  });
  return {to_type(result.o, q.scalar_type()), result.x, result.rows, result.iterations};
}

Tensor parallax_forward(const Tensor& q, const Tensor& r, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& cu_seqlens, double scale, bool causal,
                        std::optional<int64_t> window) {
  constexpr const char* kOp = "parallax";
  const Call call = open(q, k, v, cu_seqlens, std::nullopt, causal, kOp);
  const Options options = options_of(scale, causal, window, kOp);
  const Tensor x = checked_like_q(require_cpu, r, q, call.shape.key_size, kOp, "r");
  const ForwardResult result =
      dispatch(q, [&](auto zero) { return run_forward<decltype(zero)>(call, options, nullptr, &x); });
  return to_type(result.o, q.scalar_type());
}

struct BackwardResult {
  Tensor dq, dk, dv, other;   // other: of lambda, or of Parallax's r
};

template <class T>
BackwardResult run_backward(const Call& call, const Options& options, const Tensor& grad, const Tensor& x,
                            const Tensor* ridge) {
  const ScalarType type = compute_type(call.q);
  const std::vector<int64_t> sizes = sizes_of(call.q), rows{sizes[0], sizes[1], sizes[2]};
  const bool given = options.solver == Solver::kGiven;
  const Plan plan = lla::choose_plan(call.shape, call.segments);
  BackwardResult result{empty_cpu(sizes, type), empty_cpu(sizes_of(call.k), type), empty_cpu(sizes_of(call.v), type),
                        empty_cpu(given ? sizes : rows, type)};
  for (const Tensor* tensor : {&result.dq, &result.dk, &result.dv, &result.other}) {
    clear_rest(*tensor, call.segments, call.packed);
  }
  const Tensor u = empty_cpu(given ? std::vector<int64_t>{0} : sizes, type);
  const Tensor records = empty_cpu({sizes[0], sizes[1], sizes[2], lla::GradRecord::kSize}, type);
  const Tensor centres = empty_cpu({plan.blocks, call.shape.key_size}, type);
  const lla::Backward<T> problem{
      .shape = call.shape,
      .options = options,
      .q = data<T>(call.q),
      .k = data<T>(call.k),
      .v = data<T>(call.v),
      .ridge = given ? nullptr : data<T>(*ridge),
      .x = data<T>(x),
      .grad = data<T>(grad),
      .dq = mutable_data<T>(result.dq),
      .dk = mutable_data<T>(result.dk),
      .dv = mutable_data<T>(result.dv),
      .dridge = given ? nullptr : mutable_data<T>(result.other),
      .dx = given ? mutable_data<T>(result.other) : nullptr,
      .u = given ? nullptr : mutable_data<T>(u),
      .records = mutable_data<T>(records),
      .centres = mutable_data<T>(centres),
  };
  const auto& kernels = lla::kernels<T>();
  torch::stable::parallel_for(
      0, plan.blocks, 1, [&](int64_t first, int64_t last) { kernels.backward_queries(problem, plan, first, last); });
  torch::stable::parallel_for(0, plan.key_items, 1,
                              [&](int64_t first, int64_t last) { kernels.backward_keys(problem, plan, first, last); });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lla_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                        const Tensor& v, const Tensor& ridge, const Tensor& x,
                                                        const std::optional<Tensor>& cu_seqlens, double scale,
                                                        bool causal, std::optional<int64_t> window, double rtol,
                                                        int64_t max_iterations, std::string solver, bool jacobi,
                                                        bool absolute, bool ridge_grad) {
  constexpr const char* kOp = "lla_backward";
  const Call call = open(q, k, v, cu_seqlens, std::nullopt, causal, kOp);
  Options options = options_of(scale, causal, window, kOp);
  set_solver(options, {rtol, max_iterations, solver, jacobi, absolute, ridge_grad}, kOp);
  const Tensor lambda = checked_ridge(ridge, q, call.segments, options, kOp);
  const Tensor of_o = checked_like_q(require_cpu, grad, q, call.shape.value_size, kOp, "grad");
  const Tensor solution = checked_like_q(require_cpu, x, q, call.shape.key_size, kOp, "tilt");
  const BackwardResult result =
      dispatch(q, [&](auto zero) { return run_backward<decltype(zero)>(call, options, of_o, solution, &lambda); });
  const ScalarType type = q.scalar_type();
  return {to_type(result.dq, type), to_type(result.dk, type), to_type(result.dv, type),
          to_type(result.other, ridge.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> parallax_backward(const Tensor& grad, const Tensor& q, const Tensor& r,
                                                             const Tensor& k, const Tensor& v,
                                                             const std::optional<Tensor>& cu_seqlens, double scale,
                                                             bool causal, std::optional<int64_t> window) {
  constexpr const char* kOp = "parallax_backward";
  const Call call = open(q, k, v, cu_seqlens, std::nullopt, causal, kOp);
  const Options options = options_of(scale, causal, window, kOp);
  const Tensor of_o = checked_like_q(require_cpu, grad, q, call.shape.value_size, kOp, "grad");
  const Tensor x = checked_like_q(require_cpu, r, q, call.shape.key_size, kOp, "r");
  const BackwardResult result =
      dispatch(q, [&](auto zero) { return run_backward<decltype(zero)>(call, options, of_o, x, nullptr); });
  const ScalarType type = q.scalar_type();
  return {to_type(result.dq, type), to_type(result.other, r.scalar_type()), to_type(result.dk, type),
          to_type(result.dv, type)};
}

// o computed by the C++ oracle, in float64.
Tensor lla_reference(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ridge,
                     const std::optional<Tensor>& cu_seqlens, double scale, bool causal, std::optional<int64_t> window,
                     bool absolute) {
  constexpr const char* kOp = "lla_reference";
  const Shape shape = shape_of_problem(require_cpu, q, k, v, kOp);
  const std::vector<Segment> segments = segments_of(q, k, cu_seqlens, std::nullopt, causal, kOp);
  Options options = options_of(scale, causal, window, kOp);
  options.absolute = absolute;
  const Tensor wide_q = dense(q, ScalarType::Double), wide_k = dense(k, ScalarType::Double);
  const Tensor wide_v = dense(v, ScalarType::Double), lambda = dense(ridge, ScalarType::Double);
  std::vector<int64_t> sizes = sizes_of(q);
  sizes[3] = shape.value_size;
  const Tensor o = empty_cpu(sizes, ScalarType::Double);
  std::fill(mutable_data<double>(o), mutable_data<double>(o) + o.numel(), 0.0);
  lla::Forward<double> problem{};
  problem.shape = shape;
  problem.options = options;
  problem.q = data<double>(wide_q);
  problem.k = data<double>(wide_k);
  problem.v = data<double>(wide_v);
  problem.ridge = data<double>(lambda);
  problem.o = mutable_data<double>(o);
  lla::reference(problem, segments);
  return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def(
      "lla_forward(Tensor q, Tensor k, Tensor v, Tensor ridge, Tensor? start, Tensor? cu_seqlens, Tensor? lengths, "
      "float scale, bool causal, SymInt? window, float rtol, SymInt max_iterations, str solver, bool jacobi, "
      "bool absolute, bool ridge_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lla_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor ridge, Tensor tilt, Tensor? cu_seqlens, "
      "float scale, bool causal, SymInt? window, float rtol, SymInt max_iterations, str solver, bool jacobi, "
      "bool absolute, bool ridge_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "parallax_forward(Tensor q, Tensor r, Tensor k, Tensor v, Tensor? cu_seqlens, float scale, bool causal, "
      "SymInt? window) -> Tensor");
  m.def(
      "parallax_backward(Tensor grad, Tensor q, Tensor r, Tensor k, Tensor v, Tensor? cu_seqlens, float scale, "
      "bool causal, SymInt? window) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lla_reference(Tensor q, Tensor k, Tensor v, Tensor ridge, Tensor? cu_seqlens, float scale, bool causal, "
      "int? window, bool absolute) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("lla_forward", TORCH_BOX(&lla_forward));
  m.impl("lla_backward", TORCH_BOX(&lla_backward));
  m.impl("parallax_forward", TORCH_BOX(&parallax_forward));
  m.impl("parallax_backward", TORCH_BOX(&parallax_backward));
  m.impl("lla_reference", TORCH_BOX(&lla_reference));
}

}  // namespace tilewright::torch_adapter
