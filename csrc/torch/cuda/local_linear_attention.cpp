// SPDX-License-Identifier: Apache-2.0
// Local linear attention and Parallax on a device. What the host would have to read (cu_seqlens, cache_lens, the entries of
// lambda) is not checked here: offsets are clamped to the tensors, and a row whose lambda cannot be solved is NaN.
#include "torch/local_linear_attention.h"

#include "ops/local_linear_attention/cuda/launch.h"
#include "torch/cuda/device.h"

namespace tilewright::torch_adapter {
namespace {

namespace lla = local_linear_attention;
using lla::Options;
using lla::Shape;
using lla::Solver;
using lla::cuda::Sequences;
using namespace lla_checks;

Tensor integers(const Tensor& tensor, const Tensor& q, const char* op, const char* argument) {
  require_same_device(tensor, q, op, argument);
  require(tensor.scalar_type() == ScalarType::Long || tensor.scalar_type() == ScalarType::Int, op, ": ", argument,
          " has dtype ", dtype_name(tensor.scalar_type()), ", needed int64 or int32");
  require_dim(tensor, 1, op, argument, "[N]");
  return dense(tensor, ScalarType::Long);
}

// A call's tensors as the kernels read them, and what they belong to.
struct Call {
  Tensor q, k, v;
  Shape shape;
  Tensor places;  // cu_seqlens or cache_lens as int64, kept alive
  Sequences sequences;
  hopper::Stream stream;
};

Call open(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cu_seqlens,
          const std::optional<Tensor>& lengths, bool causal, const char* op) {
  const Shape shape = shape_of_problem(require_device, q, k, v, op);
  require_same_device(k, q, op, "k");
  require_same_device(v, q, op, "v");
  const int64_t batch = q.size(0), queries = q.size(1), keys = k.size(1);
  Call call{q, k, v, shape, {}, {nullptr, nullptr, batch, batch * queries, queries, keys}, stream_of(q)};
  if (cu_seqlens.has_value()) {
    call.places = integers(*cu_seqlens, q, op, "cu_seqlens");
    require(batch == 1 && keys == queries, op, ": q has shape ", shape_of(q), " and k ", shape_of(k),
            "; with cu_seqlens needed B = 1 and S = T");
    require(call.places.numel() >= 1, op, ": cu_seqlens is empty; it must begin with 0");
    call.sequences.offsets = data<int64_t>(call.places);
    call.sequences.count = call.places.numel() - 1;
  } else if (lengths.has_value()) {
    call.places = integers(*lengths, q, op, "cache_lens");
    require_size(*lengths, 0, batch, op, "cache_lens", "B");
    call.sequences.lengths = data<int64_t>(call.places);
  }
  require(!causal || cu_seqlens.has_value() || keys >= queries, op, ": q has T = ", queries,
          " queries and k S = ", keys,
          " keys; a causal query needs its own key: append the keys and values first, or pass causal=False");
  return call;
}

Tensor checked_ridge(const Tensor& ridge, const Tensor& q, const char* op) {
  require_same_device(ridge, q, op, "ridge_lambda");
  require_dim(ridge, 3, op, "ridge_lambda", "[B, T, HQ]");
  for (int64_t d = 0; d < 3; ++d) require_size(ridge, d, q.size(d), op, "ridge_lambda", "that of q");
  return dense(ridge, compute_type(q));
}

struct ForwardResult {
  Tensor o, x, rows, iterations;
};

Tensor workspace_for(const Tensor& where, int64_t doubles) { return empty_on(where, {doubles}, ScalarType::Double); }

// As the copy engine reads it: dense, from a multiple of 16 bytes on.
Tensor for_copies(const Tensor& tensor) {
  const Tensor rows = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

// Of whatever type.
const void* address(const Tensor& tensor) { return data<char>(tensor); }
void* mutable_address(const Tensor& tensor) { return mutable_data<char>(tensor); }

// The tensor-core form: 16-bit tensors as they are.
bool takes_flash(const Call& call, const Options& options) {
  const ScalarType type = call.q.scalar_type();
  return (type == ScalarType::BFloat16 || type == ScalarType::Half) &&
         lla::cuda::flash_takes(call.shape, options, call.sequences.rows, call.k.size(0) * call.k.size(1));
}

ForwardResult run_flash_forward(const Call& call, const Options& options, const Tensor* ridge, const Tensor* given) {
  const ScalarType type = call.q.scalar_type();
  const bool packed = call.sequences.offsets != nullptr;
  const auto output = [&](const std::vector<int64_t>& sizes, ScalarType of) {
    return packed ? zeros_on(call.q, sizes, of) : empty_on(call.q, sizes, of);
  };
  std::vector<int64_t> sizes = sizes_of(call.q);
  const Tensor q = for_copies(call.q), k = for_copies(call.k), v = for_copies(call.v);
  ForwardResult result;
  lla::cuda::FlashForward problem{};
  if (options.solver != Solver::kGiven) {
    result.x = output(sizes, ScalarType::Float);
    result.iterations = output({sizes[0], sizes[1], sizes[2]}, ScalarType::Int);
    result.rows = output({sizes[0], sizes[1], sizes[2], lla::RowRecord::kSize}, ScalarType::Float);
    problem.x = mutable_data<float>(result.x);
    problem.rows = mutable_data<float>(result.rows);
    problem.iterations = mutable_data<int32_t>(result.iterations);
    problem.ridge = data<float>(*ridge);
  }
  sizes[3] = call.shape.value_size;
  result.o = output(sizes, type);
  problem.shape = call.shape;
  problem.options = options;
  problem.half = type == ScalarType::Half;
  problem.key_rows = k.size(0) * k.size(1);
  problem.q = address(q);
  problem.k = address(k);
  problem.v = address(v);
  problem.given = given == nullptr ? nullptr : data<float>(*given);
  problem.o = mutable_address(result.o);
  lla::cuda::flash_forward(problem, call.sequences, call.stream);
  return result;
}

template <class T>
ForwardResult run_forward(const Call& call, const Options& options, const Tensor* ridge, const Tensor* start) {
  const ScalarType type = compute_type(call.q);
  std::vector<int64_t> sizes = sizes_of(call.q);
  const Tensor q = dense(call.q, type), k = dense(call.k, type), v = dense(call.v, type);
  ForwardResult result;
  lla::Forward<T> problem{};
  if (options.solver != Solver::kGiven) {
    result.x = empty_on(q, sizes, type);
    result.iterations = empty_on(q, {sizes[0], sizes[1], sizes[2]}, ScalarType::Int);
    result.rows = empty_on(q, {sizes[0], sizes[1], sizes[2], lla::RowRecord::kSize}, type);
    problem.x = mutable_data<T>(result.x);
    problem.rows = mutable_data<T>(result.rows);
    problem.iterations = mutable_data<int32_t>(result.iterations);
    problem.ridge = data<T>(*ridge);
  }
  sizes[3] = call.shape.value_size;
  result.o = empty_on(q, sizes, type);
  problem.shape = call.shape;
  problem.options = options;
  problem.q = data<T>(q);
  problem.k = data<T>(k);
  problem.v = data<T>(v);
  problem.start = start == nullptr ? nullptr : data<T>(*start);
  problem.o = mutable_data<T>(result.o);
  const lla::cuda::PlainPlan plan =
      lla::cuda::plan_plain<T>(call.shape, options.solver, call.sequences.rows * call.shape.heads);
  const Tensor workspace = workspace_for(q, plan.workspace_doubles);
  lla::cuda::forward(problem, call.sequences, mutable_data<double>(workspace), call.stream);
  return result;
}

ForwardResult run_decode(const Call& call, const Options& options, const lla::cuda::DecodePlan& plan,
                         const Tensor& ridge, const Tensor* start) {
  const ScalarType type = call.q.scalar_type();
  std::vector<int64_t> sizes = sizes_of(call.q);
  const Tensor q = for_copies(call.q), k = for_copies(call.k), v = for_copies(call.v);
  const ForwardResult result{
      empty_on(q, {sizes[0], sizes[1], sizes[2], call.shape.value_size}, type),
      empty_on(q, sizes, ScalarType::Float),
      empty_on(q, {sizes[0], sizes[1], sizes[2], lla::RowRecord::kSize}, ScalarType::Float),
      empty_on(q, {sizes[0], sizes[1], sizes[2]}, ScalarType::Int),
  };
  const Tensor scores = empty_on(q, {sizes[0] * sizes[1] * sizes[2], k.size(1)}, ScalarType::Float);
  const Tensor partials = empty_on(q, {plan.partials}, ScalarType::Float);
  const lla::cuda::Decode problem{
      .shape = call.shape,
      .options = options,
      .type = type == ScalarType::Float  ? lla::cuda::Storage::kFloat
              : type == ScalarType::Half ? lla::cuda::Storage::kHalf
                                         : lla::cuda::Storage::kBfloat16,
      .q = address(q),
      .k = address(k),
      .v = address(v),
      .ridge = data<float>(ridge),
      .start = start == nullptr ? nullptr : data<float>(*start),
      .o = mutable_address(result.o),
      .x = mutable_data<float>(result.x),
      .rows = mutable_data<float>(result.rows),
      .iterations = mutable_data<int32_t>(result.iterations),
      .scores = mutable_data<float>(scores),
      .partials = mutable_data<float>(partials),
  };
  lla::cuda::decode(problem, plan, call.sequences, call.stream);
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
  require_device(q, op, "q");
  const OnDevice on_device(q);
  const Call call = open(q, k, v, cu_seqlens, lengths, causal, op);
  Options options = options_of(scale, causal, window, op);
  set_solver(options, {rtol, max_iterations, solver, jacobi, absolute, ridge_grad}, op);
  const Tensor lambda = checked_ridge(ridge, q, op);
  Tensor begin;
  if (start.has_value()) begin = checked_like_q(require_device, *start, q, call.shape.key_size, op, "rho_init");
  if (lengths.has_value()) {
    const lla::cuda::DecodePlan plan =
        lla::cuda::plan_decode(call.shape, options, call.sequences, static_cast<int>(q.element_size()));
    if (plan.takes) {
      const ForwardResult result = run_decode(call, options, plan, lambda, start.has_value() ? &begin : nullptr);
      return {result.o, result.x, result.rows, result.iterations};
    }
  }
  if (!start.has_value() && takes_flash(call, options)) {
    const ForwardResult result = run_flash_forward(call, options, &lambda, nullptr);
    return {result.o, result.x, result.rows, result.iterations};
  }
  const ForwardResult result = dispatch(q, [&](auto zero) {
    return run_forward<decltype(zero)>(call, options, &lambda, start.has_value() ? &begin : nullptr);
  });
  return {torch::stable::to(result.o, q.scalar_type()), result.x, result.rows, result.iterations};
}

Tensor parallax_forward(const Tensor& q, const Tensor& r, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& cu_seqlens, double scale, bool causal,
                        std::optional<int64_t> window) {
  constexpr const char* kOp = "parallax";
  require_device(q, kOp, "q");
  const OnDevice on_device(q);
  const Call call = open(q, k, v, cu_seqlens, std::nullopt, causal, kOp);
  const Options options = options_of(scale, causal, window, kOp);
  const Tensor x = checked_like_q(require_device, r, q, call.shape.key_size, kOp, "r");
  if (takes_flash(call, options)) return run_flash_forward(call, options, nullptr, &x).o;
  const ForwardResult result =
      dispatch(q, [&](auto zero) { return run_forward<decltype(zero)>(call, options, nullptr, &x); });
  return torch::stable::to(result.o, q.scalar_type());
}

struct BackwardResult {
  Tensor dq, dk, dv, other;  // other: of lambda, or of Parallax's r
};

template <class T>
BackwardResult run_backward(const Call& call, const Options& options, const Tensor& grad, const Tensor& x,
                            const Tensor* ridge) {
  const ScalarType type = compute_type(call.q);
  const std::vector<int64_t> sizes = sizes_of(call.q), rows{sizes[0], sizes[1], sizes[2]};
  const bool given = options.solver == Solver::kGiven;
  const Tensor q = dense(call.q, type), k = dense(call.k, type), v = dense(call.v, type);
  BackwardResult result{empty_on(q, sizes, type), empty_on(q, sizes_of(k), type), empty_on(q, sizes_of(v), type),
                        empty_on(q, given ? sizes : rows, type)};
  const Tensor u = empty_on(q, given ? std::vector<int64_t>{0} : sizes, type);
  const Tensor records = empty_on(q, {sizes[0], sizes[1], sizes[2], lla::GradRecord::kSize}, type);
  const Tensor means = empty_on(q, sizes, type);
  const lla::Backward<T> problem{
      .shape = call.shape,
      .options = options,
      .q = data<T>(q),
      .k = data<T>(k),
      .v = data<T>(v),
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
      .centres = mutable_data<T>(means),
  };
  const lla::cuda::PlainPlan plan =
      lla::cuda::plan_plain<T>(call.shape, options.solver, call.sequences.rows * call.shape.heads);
  const Tensor workspace = workspace_for(q, plan.workspace_doubles);
  lla::cuda::backward(problem, call.sequences, k.size(0) * k.size(1), mutable_data<double>(workspace), call.stream);
  return result;
}

BackwardResult run_flash_backward(const Call& call, const Options& options, const Tensor& grad, const Tensor& x,
                                  const Tensor* ridge) {
  const ScalarType type = call.q.scalar_type();
  const std::vector<int64_t> sizes = sizes_of(call.q), rows{sizes[0], sizes[1], sizes[2]};
  const bool given = options.solver == Solver::kGiven, packed = call.sequences.offsets != nullptr;
  const auto output = [&](const std::vector<int64_t>& of, ScalarType as) {
    return packed ? zeros_on(call.q, of, as) : empty_on(call.q, of, as);
  };
  const Tensor q = for_copies(call.q), k = for_copies(call.k), v = for_copies(call.v), of_o = for_copies(grad);
  const BackwardResult result{output(sizes, type), output(sizes_of(k), type), output(sizes_of(v), type),
                              output(given ? sizes : rows, ScalarType::Float)};
  const Tensor u = empty_on(q, given ? std::vector<int64_t>{0} : sizes, ScalarType::Float);
  // Rows behind the last packed sequence are read beside others, and weigh nothing.
  const Tensor rounded_x = output(sizes, type), rounded_u = output(sizes, type);
  const Tensor records = output({sizes[2], sizes[0] * sizes[1], lla::cuda::flash_record_floats()}, ScalarType::Float);
  const lla::cuda::FlashBackward problem{
      .shape = call.shape,
      .options = options,
      .key_rows = k.size(0) * k.size(1),
      .q = address(q),
      .k = address(k),
      .v = address(v),
      .grad = address(of_o),
      .ridge = given ? nullptr : data<float>(*ridge),
      .x = data<float>(x),
      .dq = mutable_address(result.dq),
      .dk = mutable_address(result.dk),
      .dv = mutable_address(result.dv),
      .dridge = given ? nullptr : mutable_data<float>(result.other),
      .dx = given ? mutable_data<float>(result.other) : nullptr,
      .u = given ? nullptr : mutable_data<float>(u),
      .rounded_x = mutable_address(rounded_x),
      .rounded_u = mutable_address(rounded_u),
      .records = mutable_data<float>(records),
  };
  lla::cuda::flash_backward(problem, call.sequences, call.stream);
  return result;
}

BackwardResult differentiate(const Call& call, const Options& options, const Tensor& grad, const Tensor& x,
                             const Tensor* ridge, const char* op) {
  const Tensor solution = checked_like_q(require_device, x, call.q, call.shape.key_size, op,
                                         options.solver == Solver::kGiven ? "r" : "tilt");
  if (call.q.scalar_type() == ScalarType::BFloat16 && takes_flash(call, options)) {
    checked_like_q(require_device, grad, call.q, call.shape.value_size, op, "grad");
    return run_flash_backward(call, options, torch::stable::to(grad, ScalarType::BFloat16), solution, ridge);
  }
  const Tensor of_o = checked_like_q(require_device, grad, call.q, call.shape.value_size, op, "grad");
  return dispatch(call.q,
                  [&](auto zero) { return run_backward<decltype(zero)>(call, options, of_o, solution, ridge); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lla_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                        const Tensor& v, const Tensor& ridge, const Tensor& x,
                                                        const std::optional<Tensor>& cu_seqlens, double scale,
                                                        bool causal, std::optional<int64_t> window, double rtol,
                                                        int64_t max_iterations, std::string solver, bool jacobi,
                                                        bool absolute, bool ridge_grad) {
  constexpr const char* kOp = "lla_backward";
  require_device(q, kOp, "q");
  const OnDevice on_device(q);
  const Call call = open(q, k, v, cu_seqlens, std::nullopt, causal, kOp);
  Options options = options_of(scale, causal, window, kOp);
  set_solver(options, {rtol, max_iterations, solver, jacobi, absolute, ridge_grad}, kOp);
  const Tensor lambda = checked_ridge(ridge, q, kOp);
  const BackwardResult result = differentiate(call, options, grad, x, &lambda, kOp);
  const ScalarType type = q.scalar_type();
  return {torch::stable::to(result.dq, type), torch::stable::to(result.dk, type), torch::stable::to(result.dv, type),
          torch::stable::to(result.other, ridge.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> parallax_backward(const Tensor& grad, const Tensor& q, const Tensor& r,
                                                             const Tensor& k, const Tensor& v,
                                                             const std::optional<Tensor>& cu_seqlens, double scale,
                                                             bool causal, std::optional<int64_t> window) {
  constexpr const char* kOp = "parallax_backward";
  require_device(q, kOp, "q");
  const OnDevice on_device(q);
  const Call call = open(q, k, v, cu_seqlens, std::nullopt, causal, kOp);
  const Options options = options_of(scale, causal, window, kOp);
  const BackwardResult result = differentiate(call, options, grad, r, nullptr, kOp);
  const ScalarType type = q.scalar_type();
  return {torch::stable::to(result.dq, type), torch::stable::to(result.other, r.scalar_type()),
          torch::stable::to(result.dk, type), torch::stable::to(result.dv, type)};
}

}  // namespace

TILEWRIGHT_DEVICE_OPERATORS(m) {
  m.impl("lla_forward", TORCH_BOX(&lla_forward));
  m.impl("lla_backward", TORCH_BOX(&lla_backward));
  m.impl("parallax_forward", TORCH_BOX(&parallax_forward));
  m.impl("parallax_backward", TORCH_BOX(&parallax_backward));
}

}  // namespace tilewright::torch_adapter
