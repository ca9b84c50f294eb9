// SPDX-License-Identifier: Apache-2.0
// What a token passes between the linears: normalization, rotary angles and the gated activation.
#include "ops/gated_activation/kernels.h"
#include "ops/rms_norm/kernels.h"
#include "ops/rope/kernels.h"
#include "torch/token_checks.h"

namespace tilewright::torch_adapter {
namespace {

constexpr int64_t kTokensPerThread = 16;

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  constexpr const char* kOp = "rms_norm";
  require_cpu(x, kOp, "x");
  require_cpu(weight, kOp, "weight");
  const int64_t width = check_rms_norm(x, weight, eps);
  const Tensor input = as_float(x, kOp, "x"), factors = as_float(weight, kOp, "weight");
  const Tensor y = empty_cpu(sizes_of(x), ScalarType::Float);
  const auto normalize = rms_norm::kernel();
  const auto* from = data<float>(input);
  auto* to = mutable_data<float>(y);
  torch::stable::parallel_for(0, x.numel() / width, kTokensPerThread, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      normalize(from + t * width, data<float>(factors), width, static_cast<float>(eps), to + t * width);
    }
  });
  return to_type(y, x.scalar_type());
}

Tensor rope_angles(const Tensor& positions, const Tensor& frequencies, double gain) {
  constexpr const char* kOp = "rope_angles";
  require_cpu(positions, kOp, "positions");
  require_cpu(frequencies, kOp, "frequencies");
  const std::vector<int64_t> sizes = check_rope_angles(positions, frequencies);
  const Tensor where = torch::stable::contiguous(positions), turns = as_float(frequencies, kOp, "frequencies");
  const int64_t pairs = turns.size(0);
  const Tensor angles = empty_cpu(sizes, ScalarType::Float);
  torch::stable::parallel_for(0, where.numel(), kTokensPerThread, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      float* row = mutable_data<float>(angles) + t * 2 * pairs;
      rope::angles(data<int64_t>(where)[t], data<float>(turns), pairs, static_cast<float>(gain), row, row + pairs);
    }
  });
  return angles;
}

void rope_rotate(const Tensor& x, const Tensor& angles, const std::optional<Tensor>& scales) {
  constexpr const char* kOp = "rope_rotate_";
  require_cpu(x, kOp, "x");
  require_cpu(angles, kOp, "angles");
  if (scales.has_value()) require_cpu(*scales, kOp, "scales");
  const int64_t heads_per_scale = check_rope_rotate(x, angles, scales);
  const Tensor turns = torch::stable::contiguous(angles);
  const std::optional<Tensor> factors =
      scales.has_value() ? std::optional<Tensor>(as_float(*scales, kOp, "scales")) : std::nullopt;
  const auto rotate = rope::kernel();
  const int64_t row = x.size(1) * x.size(2), pairs = x.size(2) / 2;
  torch::stable::parallel_for(0, x.size(0), kTokensPerThread, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const float* angle = data<float>(turns) + t * 2 * pairs;
      rotate({mutable_data<float>(x) + t * row, x.size(1), x.size(2), angle, angle + pairs,
              factors.has_value() ? data<float>(*factors) : nullptr, heads_per_scale});
    }
  });
}

Tensor gated(const Tensor& gate, const Tensor& up, gated_activation::Function function, const char* kOp) {
  require_cpu(gate, kOp, "gate");
  require_cpu(up, kOp, "up");
  check_gated_activation(gate, up);
  const Tensor g = as_float(gate, kOp, "gate"), u = as_float(up, kOp, "up");
  const Tensor y = empty_cpu(sizes_of(gate), ScalarType::Float);
  const int64_t width = std::max<int64_t>(gate.size(gate.dim() - 1), 1);
  const auto multiply = gated_activation::kernel(function);
  torch::stable::parallel_for(0, gate.numel() / width, kTokensPerThread, [&](int64_t first, int64_t last) {
    for (int64_t at = first * width; at < last * width; at += width) {
      multiply(data<float>(g) + at, data<float>(u) + at, width, mutable_data<float>(y) + at);
    }
  });
  return to_type(y, gate.scalar_type());
}

Tensor gated_activation(const Tensor& gate, const Tensor& up) {
  return gated(gate, up, gated_activation::Function::kSilu, "gated_activation");
}

Tensor gated_squared_relu(const Tensor& gate, const Tensor& up) {
  return gated(gate, up, gated_activation::Function::kSquaredRelu, "gated_squared_relu");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rope_angles(Tensor positions, Tensor frequencies, float gain) -> Tensor");
  m.def("rope_rotate_(Tensor(a!) x, Tensor angles, Tensor? scales) -> ()");
  m.def("gated_activation(Tensor gate, Tensor up) -> Tensor");
  m.def("gated_squared_relu(Tensor gate, Tensor up) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rope_angles", TORCH_BOX(&rope_angles));
  m.impl("rope_rotate_", TORCH_BOX(&rope_rotate));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("gated_squared_relu", TORCH_BOX(&gated_squared_relu));
}

}  // namespace tilewright::torch_adapter
