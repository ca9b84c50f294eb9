// SPDX-License-Identifier: Apache-2.0
// ternary_matmul, ternary_linear and what they need, on a CUDA device. Shapes come as arguments, not from the header of
// the data: reading that would make the host wait for the device.
#include "torch/ternary_linear.h"

#include "ops/ternary_linear/cuda/launch.h"
#include "torch/cuda/device.h"

namespace tilewright::torch_adapter {
namespace {

using format::TernaryPacking;
using ternary_linear::DevicePlan;
namespace kernels = ternary_linear::cuda;

constexpr int64_t kAlignment = 16;  // of rows of x, for the copy engine

bool is_aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0; }

// The data of a weight [n, k] of packing mma2, checked as far as a shape says.
const uint8_t* payload_of(const Tensor& blob, const Tensor& x, int64_t n, int64_t k, int64_t packing, const char* op) {
  require_same_device(blob, x, op, "data");
  require_ternary_blob(blob, op);
  require_ternary_columns(k, op);
  require(packing == static_cast<int64_t>(TernaryPacking::kMma2), op, ": the weight has packing ", packing,
          ", CUDA kernels read 'mma2' (", static_cast<int>(TernaryPacking::kMma2),
          "); move the weight with PackedTernary.to('cuda'), which converts it");
  const int64_t needed =
      static_cast<int64_t>(sizeof(format::PackedHeader)) + format::ternary_payload_bytes(TernaryPacking::kMma2, n, k);
  require(blob.numel() == needed, op, ": data holds ", blob.numel(), " bytes, [", n, ", ", k, "] as 'mma2' has ",
          needed, "; out_features and K must be those that were packed");
  require(is_aligned(blob), op, ": data does not start at a multiple of 16 bytes; pass the blob itself, not a view");
  return data<uint8_t>(blob) + sizeof(format::PackedHeader);
}

// Contiguous codes whose rows start at multiples of 16 bytes.
struct Codes {
  Tensor codes;
  int64_t stride;
};

Codes aligned_codes(const Tensor& x, int64_t m, int64_t k) {
  const Tensor codes = torch::stable::contiguous(x);
  const int64_t stride = round_up(std::max<int64_t>(k, 1), kAlignment);
  if (stride == k && is_aligned(codes)) return {codes, stride};
  const Tensor padded = empty_on(x, {m, stride}, ScalarType::Char);
  kernels::launch_pad(data<int8_t>(codes), m, k, mutable_data<int8_t>(padded), stride, stream_of(x));
  return {padded, stride};
}

// Memory for the sums of splits; empty for one split.
struct Exchange {
  std::optional<Tensor> partial, tickets;

  Exchange(const Tensor& where, const DevicePlan& plan, bool zero) {
    if (plan.splits <= 1) return;
    partial = empty_on(where, {kernels::partial_count(plan)}, ScalarType::Int);
    tickets =
        zero ? zeros_on(where, {plan.tiles()}, ScalarType::Int) : empty_on(where, {plan.tiles()}, ScalarType::Int);
  }
  void give(kernels::Problem& problem) const {
    if (!partial.has_value()) return;
    problem.partial = mutable_data<int32_t>(*partial);
    problem.tickets = mutable_data<uint32_t>(*tickets);
  }
};

Tensor ternary_matmul(const Tensor& x, const Tensor& blob, int64_t out_features, int64_t packing) {
  constexpr const char* kOp = "ternary_matmul";
  require_device(x, kOp, "x");
  const OnDevice guard(x);
  require(x.dim() >= 1, kOp, ": x is a scalar, needed [..., K]");
  const int64_t m = rows_of(x), k = x.size(x.dim() - 1);
  require_codes(x, k, kOp);
  const uint8_t* payload = payload_of(blob, x, out_features, k, packing, kOp);
  if (k == 0) return zeros_on(x, with_last(x, out_features), ScalarType::Int);
  Tensor y = empty_on(x, with_last(x, out_features), ScalarType::Int);
  const auto [codes, stride] = aligned_codes(x, m, k);
  const DevicePlan plan = kernels::plan_on_device(m, out_features, k);
  const Exchange exchange(x, plan, true);
  kernels::Problem problem{
      .payload = payload,
      .x = data<int8_t>(codes),
      .x_stride = stride,
      .m = m,
      .n = out_features,
      .k = k,
      .out = {.y = mutable_data<char>(y), .element = kernels::Element::kInt32},
  };
  exchange.give(problem);
  kernels::launch_matmul(problem, plan, false, stream_of(x));
  return y;
}

kernels::Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return kernels::Element::kBFloat16;
    case ScalarType::Half: return kernels::Element::kHalf;
    default: return kernels::Element::kFloat;
  }
}

// x as the quantizing kernel reads it: contiguous, float64 as float32.
Tensor readable(const Tensor& x, const char* op) {
  require(is_floating(x.scalar_type()), op, ": x has dtype ", dtype_name(x.scalar_type()),
          ", needed float32, bfloat16, float16 or float64");
  const bool wide = x.scalar_type() == ScalarType::Double;
  return torch::stable::contiguous(wide ? torch::stable::to(x, ScalarType::Float) : x);
}

struct Quantized {
  Tensor codes, scales;
  int64_t stride;
};

Quantized quantize(const Tensor& x, int64_t m, int64_t k, const Exchange* exchange) {
  const int64_t stride = round_up(std::max<int64_t>(k, 1), kAlignment);
  Quantized out{empty_on(x, {m, stride}, ScalarType::Char), empty_on(x, {m}, ScalarType::Float), stride};
  const bool tickets = exchange != nullptr && exchange->tickets.has_value();
  kernels::launch_quantize(
      {
          .x = data<char>(x),
          .element = element_of(x.scalar_type()),
          .m = m,
          .k = k,
          .codes = mutable_data<int8_t>(out.codes),
          .stride = stride,
          .scales = mutable_data<float>(out.scales),
          .tickets = tickets ? mutable_data<uint32_t>(*exchange->tickets) : nullptr,
          .ticket_count = tickets ? exchange->tickets->numel() : 0,
      },
      stream_of(x));
  return out;
}

Tensor ternary_linear_cuda(const Tensor& x, const Tensor& blob, const Tensor& scale, const std::optional<Tensor>& bias,
                           int64_t out_features, int64_t packing, std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "ternary_linear";
  require_device(x, kOp, "x");
  const OnDevice guard(x);
  require(x.dim() >= 1, kOp, ": x is a scalar, needed [..., K]");
  const int64_t m = rows_of(x), k = x.size(x.dim() - 1);
  require_same_device(scale, x, kOp, "scale");
  if (bias.has_value()) require_same_device(*bias, x, kOp, "bias");
  const LinearArguments arguments = check_linear(x, out_features, k, scale, bias, out_dtype, kOp);
  const uint8_t* payload = payload_of(blob, x, out_features, k, packing, kOp);
  const Tensor input = readable(x, kOp), weight_scales = as_float(scale, kOp, "scale");
  std::optional<Tensor> b;
  if (bias.has_value()) b = as_float(*bias, kOp, "bias");
  const bool wide = arguments.out == ScalarType::Double;
  Tensor y = empty_on(x, with_last(x, out_features), wide ? ScalarType::Float : arguments.out);
  const DevicePlan plan = kernels::plan_on_device(m, out_features, k);
  const Exchange exchange(x, plan, false);
  const Quantized tokens = quantize(input, m, k, &exchange);
  kernels::Problem problem{
      .payload = payload,
      .x = data<int8_t>(tokens.codes),
      .x_stride = tokens.stride,
      .m = m,
      .n = out_features,
      .k = k,
      .out = {.y = mutable_data<char>(y),
              .element = element_of(y.scalar_type()),
              .token_scales = data<float>(tokens.scales),
              .weight_scales = data<float>(weight_scales),
              .weight_scale_step = scale.numel() == 1 ? 0 : 1,
              .bias = b.has_value() ? data<float>(*b) : nullptr},
  };
  exchange.give(problem);
  kernels::launch_matmul(problem, plan, true, stream_of(x));
  return wide ? torch::stable::to(y, ScalarType::Double) : y;
}

std::tuple<Tensor, Tensor> ternary_quantize(const Tensor& x) {
  constexpr const char* kOp = "ternary_quantize";
  require_device(x, kOp, "x");
  const OnDevice guard(x);
  require(x.dim() >= 1, kOp, ": x is a scalar, needed [..., K]");
  const int64_t m = rows_of(x), k = x.size(x.dim() - 1);
  Quantized tokens = quantize(readable(x, kOp), m, k, nullptr);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const Tensor codes = torch::stable::contiguous(torch::stable::narrow(tokens.codes, 1, 0, k));
  Tensor scales = tokens.scales;
  const std::vector<int64_t> leading(sizes.begin(), sizes.end() - 1);
  return {torch::stable::view(codes, sizes), torch::stable::view(scales, leading)};
}

Tensor ternary_unpack(const Tensor& blob, int64_t rows, int64_t cols, int64_t packing) {
  constexpr const char* kOp = "ternary_unpack";
  require_device(blob, kOp, "data");
  const OnDevice guard(blob);
  const uint8_t* payload = payload_of(blob, blob, rows, cols, packing, kOp);
  Tensor out = empty_on(blob, {rows, cols}, ScalarType::Char);
  kernels::launch_unpack(payload, rows, cols, mutable_data<int8_t>(out), stream_of(blob));
  return out;
}

}  // namespace

TILEWRIGHT_DEVICE_OPERATORS(m) {
  m.impl("ternary_matmul", TORCH_BOX(&ternary_matmul));
  m.impl("ternary_linear", TORCH_BOX(&ternary_linear_cuda));
  m.impl("ternary_quantize", TORCH_BOX(&ternary_quantize));
  m.impl("ternary_unpack", TORCH_BOX(&ternary_unpack));
}

}  // namespace tilewright::torch_adapter
