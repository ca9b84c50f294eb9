// SPDX-License-Identifier: Apache-2.0
// What a token passes between the linears: normalization, rotary angles and the gated activation.
#include "ops/gated_activation/kernels.h"
#include "ops/rms_norm/kernels.h"
#include "ops/rope/kernels.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter {
namespace {

constexpr int64_t kTokensPerThread = 16;

std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  constexpr const char* kOp = "rms_norm";
  require_cpu(x, kOp, "x");
  require_cpu(weight, kOp, "weight");
  require_dim(weight, 1, kOp, "weight", "[K]");
  const int64_t width = weight.size(0);
  require(width > 0, kOp, ": weight is empty, needed at least one column");
  require(x.dim() >= 1, kOp, ": x is a scalar, needed [..., K] with K = ", width);
  require_size(x, x.dim() - 1, width, kOp, "x", "K");
  require(eps >= 0.0, kOp, ": eps = ", eps, ", needed a number >= 0");
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
  return torch::stable::to(y, x.scalar_type());
}

Tensor rope_angles(const Tensor& positions, const Tensor& frequencies, double gain) {
  constexpr const char* kOp = "rope_angles";
  require_cpu(positions, kOp, "positions");
  require_cpu(frequencies, kOp, "frequencies");
  require_dtype(positions, ScalarType::Long, kOp, "positions");
  require_dim(frequencies, 1, kOp, "frequencies", "[P]");
  const Tensor where = torch::stable::contiguous(positions), turns = as_float(frequencies, kOp, "frequencies");
  const int64_t pairs = turns.size(0);
  std::vector<int64_t> sizes = sizes_of(positions);
  sizes.insert(sizes.end(), {2, pairs});
  const Tensor angles = empty_cpu(sizes, ScalarType::Float);
  torch::stable::parallel_for(0, where.numel(), kTokensPerThread, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      float* row = mutable_data<float>(angles) + t * 2 * pairs;
      rope::angles(data<int64_t>(where)[t], data<float>(turns), pairs, static_cast<float>(gain), row, row + pairs);
    }
  });
  return angles;
}

Tensor gated_activation(const Tensor& gate, const Tensor& up) {
  constexpr const char* kOp = "gated_activation";
  require_cpu(gate, kOp, "gate");
  require_cpu(up, kOp, "up");
  require(sizes_of(gate) == sizes_of(up), kOp, ": gate has shape ", shape_of(gate), ", up ", shape_of(up),
          "; they must be the same");
  require(gate.dim() >= 1, kOp, ": gate is a scalar, needed [..., K]");
  const Tensor g = as_float(gate, kOp, "gate"), u = as_float(up, kOp, "up");
  const Tensor y = empty_cpu(sizes_of(gate), ScalarType::Float);
  const int64_t width = std::max<int64_t>(gate.size(gate.dim() - 1), 1);
  const auto multiply = gated_activation::kernel();
  torch::stable::parallel_for(0, gate.numel() / width, kTokensPerThread, [&](int64_t first, int64_t last) {
    for (int64_t at = first * width; at < last * width; at += width) {
      multiply(data<float>(g) + at, data<float>(u) + at, width, mutable_data<float>(y) + at);
    }
  });
  return torch::stable::to(y, gate.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rope_angles(Tensor positions, Tensor frequencies, float gain) -> Tensor");
  m.def("gated_activation(Tensor gate, Tensor up) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rope_angles", TORCH_BOX(&rope_angles));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
}

}  // namespace tilewright::torch_adapter
