// SPDX-License-Identifier: Apache-2.0
// int4_fp8_linear on a GPU: the weight in the Hopper layout, tokens rounded by a kernel of their own.
#include <tuple>

#include "ops/int4_linear/cuda/launch.h"
#include "torch/cuda/device.h"

namespace tilewright::torch_adapter {
namespace {

using format::Int4Hopper;
using format::Int4HopperView;
using int4_linear::DevicePlan;
using int4_linear::Number;

Number number_of(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Number::kFloat32;
    case ScalarType::BFloat16: return Number::kBFloat16;
    case ScalarType::Half: return Number::kFloat16;
    default:
      fail(op, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
           ", needed float32, bfloat16, float16 or float64");
  }
}

// Contiguous, float64 as float32: kernels read the three others as they are.
Tensor as_read(const Tensor& tensor) {
  const bool wide = tensor.scalar_type() == ScalarType::Double;
  return torch::stable::contiguous(wide ? torch::stable::to(tensor, ScalarType::Float) : tensor);
}

Int4HopperView view_of(const Tensor& weight, const Tensor& beside, int64_t n, int64_t k, int64_t layout,
                       const char* op) {
  require_same_device(weight, beside, op, "weight");
  require(layout != 0, op,
          ": weight is in the CPU's layout; PackedInt4.to('cuda') (or W4A8Linear.to('cuda')) makes it "
          "that of the GPU");
  require_dtype(weight, ScalarType::Byte, op, "weight");
  require_dim(weight, 1, op, "weight", "the one-dimensional blob of a PackedInt4");
  require(weight.is_contiguous(), op, ": weight must be contiguous; pass the blob of a PackedInt4 itself");
  require(n >= 0 && n < format::kMaxDim && k > 0 && k < format::kMaxDim, op, ": out_features = ", n, " and K = ", k,
          " are outside what can be packed");
  const Int4HopperView view = format::int4_hopper_from_word(n, k, layout, op);
  require(weight.numel() == view.blob_bytes(), op, ": weight has ", weight.numel(), " bytes, but N = ", n, ", K = ", k,
          " in layout ", layout, " need ", view.blob_bytes(), "; pass x, weight and out_features of one layer");
  return view;
}

struct Tokens {
  Tensor codes, scales, sums;
};

// What the layer before makes of x; see QuantizeProblem.
struct Before {
  std::optional<Tensor> gate, norm;
  double eps = 0.0;
};

// `sub` 0: no sums.
Tokens quantize(const Tensor& x, const Before& before, int64_t m, int64_t k, int sub, const Tensor& counters,
                const char* op) {
  const int64_t padded_k = round_up(k, Int4Hopper::kCols), stride = round_up(m, 128);
  Tokens out{empty_on(x, {m, padded_k}, ScalarType::Byte), empty_on(x, {m}, ScalarType::Float),
             empty_on(x, {sub == 0 ? 0 : padded_k / sub, sub == 0 ? 0 : stride}, ScalarType::Float)};
  int4_linear::quantize_tokens({.x = data<char>(x),
                                .gate = before.gate.has_value() ? data<char>(*before.gate) : nullptr,
                                .norm = before.norm.has_value() ? data<char>(*before.norm) : nullptr,
                                .eps = static_cast<float>(before.eps),
                                .type = number_of(x, op, "x"),
                                .m = m,
                                .k = k,
                                .padded_k = padded_k,
                                .codes = mutable_data<uint8_t>(out.codes),
                                .scales = mutable_data<float>(out.scales),
                                .sums = sub == 0 ? nullptr : mutable_data<float>(out.sums),
                                .sums_stride = stride,
                                .sub = sub,
                                .counters = mutable_data<int32_t>(counters),
                                .counter_count = counters.numel()},
                               stream_of(x));
  return out;
}

// Checks bias, and multiplies. `counters` are zero by the time the product runs.
void multiply(const Tokens& tokens, const Tensor& weight, const Int4HopperView& view, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, const Tensor& y, const Tensor& counters, const DevicePlan& plan,
              bool overlap, const char* op) {
  std::optional<Tensor> b;
  if (bias.has_value()) {
    require_same_device(*bias, weight, op, "bias");
    require_dim(*bias, 1, op, "bias", "[N]");
    require_size(*bias, 0, view.n, op, "bias", "N");
    b = as_read(*bias);
  }
  std::optional<Tensor> r;
  if (residual.has_value()) {
    require_same_device(*residual, weight, op, "residual");
    require(shape_of(*residual) == shape_of(y), op, ": residual has shape ", shape_of(*residual),
            ", needed that of the result, ", shape_of(y));
    r = torch::stable::contiguous(torch::stable::to(*residual, y.scalar_type()));
  }
  const Tensor pieces = empty_on(weight, {plan.piece_slots() * plan.piece_floats()}, ScalarType::Float);
  int4_linear::MatrixProblem problem{.weight = view,
                                     .blob = data<uint8_t>(weight),
                                     .m = y.numel() / view.n,
                                     .codes = data<uint8_t>(tokens.codes),
                                     .scales = data<float>(tokens.scales),
                                     .sums = data<float>(tokens.sums),
                                     .bias = b.has_value() ? data<char>(*b) : nullptr,
                                     .bias_type = b.has_value() ? number_of(*b, op, "bias") : Number::kFloat32,
                                     .residual = r.has_value() ? data<char>(*r) : nullptr,
                                     .y = mutable_data<char>(y),
                                     .y_type = number_of(y, op, "y"),
                                     .pieces = mutable_data<float>(pieces),
                                     .counters = mutable_data<int32_t>(counters),
                                     .overlap = overlap};
  problem.sums_stride = round_up(problem.m, 128);
  int4_linear::multiply(problem, plan, stream_of(weight));
}

DevicePlan plan_of(int64_t m, const Int4HopperView& view, bool fold, const char* op) {
  require(!fold || view.offset_kind == format::OffsetKind::kSymmetric, op,
          ": mode='fold' needs a symmetric weight; use mode='exact' for weights with minima or zero points");
  require(
      !fold || view.signed_codes, op,
      ": mode='fold' on a GPU needs codes in -7..7, and this weight has a -8; use mode='exact', or quantize it again");
  return int4_linear::choose_device_plan(m, view, fold, int4_linear::multiprocessors());
}

bool needs_sums(const DevicePlan& plan) { return plan.form == int4_linear::Form::kUnsigned; }

Tensor int4_fp8_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                       bool fold, int64_t layout, const std::optional<Tensor>& residual) {
  constexpr const char* kOp = "int4_fp8_linear";
  require_device(x, kOp, "x");
  require(x.dim() >= 1, kOp, ": x is a scalar, needed [..., K]");
  require(is_floating(x.scalar_type()), kOp, ": x has dtype ", dtype_name(x.scalar_type()),
          ", needed float32, bfloat16, float16 or float64");
  const OnDevice guard(x);
  const int64_t k = x.size(x.dim() - 1);
  const Int4HopperView view = view_of(weight, x, out_features, k, layout, kOp);
  const Tensor input = as_read(x);
  const int64_t m = input.numel() / k;
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = view.n;
  const Tensor y = empty_on(input, sizes, input.scalar_type());
  const DevicePlan plan = plan_of(m, view, fold, kOp);
  if (m > 0 && view.n > 0) {
    const Tensor counters = empty_on(input, {plan.counters()}, ScalarType::Int);
    const Tokens tokens = quantize(input, {}, m, k, needs_sums(plan) ? view.sub : 0, counters, kOp);
    multiply(tokens, weight, view, bias, residual, y, counters, plan, true, kOp);
  }
  return torch::stable::to(y, x.scalar_type());
}

// Tokens rounded once for several layers: codes [M, Kp], scales [M], and sums of every `sub` codes if that is not 0.
std::tuple<Tensor, Tensor, Tensor> fp8_quantize_tokens(const Tensor& x, int64_t sub, const std::optional<Tensor>& gate,
                                                       const std::optional<Tensor>& norm, double eps) {
  constexpr const char* kOp = "fp8_quantize_tokens";
  require_device(x, kOp, "x");
  require(x.dim() >= 1 && x.size(x.dim() - 1) > 0, kOp, ": x has shape ", shape_of(x), ", needed [..., K]");
  require(is_floating(x.scalar_type()), kOp, ": x has dtype ", dtype_name(x.scalar_type()),
          ", needed float32, bfloat16, float16 or float64");
  require(sub == 0 || sub == 16 || sub == 32 || sub == 64 || sub == 128, kOp, ": sub = ", sub,
          ", needed 0, 16, 32, 64 or 128");
  const OnDevice guard(x);
  const Tensor input = as_read(x);
  const int64_t k = input.size(input.dim() - 1);
  Before before{std::nullopt, std::nullopt, eps};
  if (gate.has_value()) {
    require_same_device(*gate, x, kOp, "gate");
    require(shape_of(*gate) == shape_of(x), kOp, ": gate has shape ", shape_of(*gate), ", needed that of x, ",
            shape_of(x));
    before.gate = torch::stable::contiguous(torch::stable::to(*gate, input.scalar_type()));
  }
  if (norm.has_value()) {
    require_same_device(*norm, x, kOp, "norm");
    require_dim(*norm, 1, kOp, "norm", "[K]");
    require_size(*norm, 0, k, kOp, "norm", "K");
    before.norm = torch::stable::contiguous(torch::stable::to(*norm, input.scalar_type()));
  }
  const Tensor counters = empty_on(input, {0}, ScalarType::Int);
  Tokens out = quantize(input, before, input.numel() / k, k, static_cast<int>(sub), counters, kOp);
  return {out.codes, out.scales, out.sums};
}

// The product alone, of tokens that fp8_quantize_tokens gave; y is written.
void int4_fp8_linear_quantized(const Tensor& codes, const Tensor& scales, const Tensor& sums, const Tensor& weight,
                               const std::optional<Tensor>& bias, int64_t in_features, bool fold, int64_t layout,
                               Tensor y, const std::optional<Tensor>& residual) {
  constexpr const char* kOp = "int4_fp8_linear_quantized";
  require_device(codes, kOp, "codes");
  require_same_device(scales, codes, kOp, "scales");
  require_same_device(sums, codes, kOp, "sums");
  require_same_device(y, codes, kOp, "y");
  require_dim(codes, 2, kOp, "codes", "[M, Kp]");
  require_dim(y, 2, kOp, "y", "[M, N]");
  const OnDevice guard(codes);
  const Int4HopperView view = view_of(weight, codes, y.size(1), in_features, layout, kOp);
  const int64_t m = codes.size(0);
  require_dtype(codes, ScalarType::Byte, kOp, "codes");
  require_dtype(scales, ScalarType::Float, kOp, "scales");
  require_dtype(sums, ScalarType::Float, kOp, "sums");
  require_size(codes, 1, view.tiles * Int4Hopper::kCols, kOp, "codes", "K rounded up to 128");
  require(scales.numel() == m, kOp, ": scales has ", scales.numel(), " elements, needed M = ", m);
  require_size(y, 0, m, kOp, "y", "M");
  require(codes.is_contiguous() && scales.is_contiguous() && sums.is_contiguous() && y.is_contiguous(), kOp,
          ": codes, scales, sums and y must be contiguous");
  const DevicePlan plan = plan_of(m, view, fold, kOp);
  const int64_t rows = view.tiles * view.subs();
  require(!needs_sums(plan) || sums.numel() == rows * round_up(m, 128), kOp, ": sums has ", sums.numel(),
          " elements, but this weight needs those of every ", view.sub,
          " columns; quantize the tokens with quantize_tokens(x, weight)");
  if (m == 0 || view.n == 0) return;
  const Tensor counters = zeros_on(codes, {plan.counters()}, ScalarType::Int);
  multiply({codes, scales, sums}, weight, view, bias, residual, y, counters, plan, false, kOp);
}

}  // namespace

TILEWRIGHT_DEVICE_OPERATORS(m) {
  m.impl("int4_fp8_linear", TORCH_BOX(&int4_fp8_linear));
  m.impl("fp8_quantize_tokens", TORCH_BOX(&fp8_quantize_tokens));
  m.impl("int4_fp8_linear_quantized", TORCH_BOX(&int4_fp8_linear_quantized));
}

}  // namespace tilewright::torch_adapter
