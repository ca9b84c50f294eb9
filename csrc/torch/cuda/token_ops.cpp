// SPDX-License-Identifier: Apache-2.0
// rms_norm, rope_angles, rope_rotate_ and gated_activation on a CUDA device.
#include "ops/gated_activation/cuda/launch.h"
#include "ops/rms_norm/cuda/launch.h"
#include "ops/rope/cuda/launch.h"
#include "torch/cuda/device.h"
#include "torch/token_checks.h"

namespace tilewright::torch_adapter {
namespace {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  constexpr const char* kOp = "rms_norm";
  require_device(x, kOp, "x");
  require_same_device(weight, x, kOp, "weight");
  const int64_t width = check_rms_norm(x, weight, eps);
  const OnDevice on(x);
  const Tensor input = as_float(x, kOp, "x"), factors = as_float(weight, kOp, "weight");
  const Tensor y = empty_on(x, sizes_of(x), ScalarType::Float);
  rms_norm::launch({data<float>(input), data<float>(factors), mutable_data<float>(y), x.numel() / width, width,
                    static_cast<float>(eps)},
                   stream_of(x));
  return torch::stable::to(y, x.scalar_type());
}

Tensor rope_angles(const Tensor& positions, const Tensor& frequencies, double gain) {
  constexpr const char* kOp = "rope_angles";
  require_device(positions, kOp, "positions");
  require_same_device(frequencies, positions, kOp, "frequencies");
  const std::vector<int64_t> sizes = check_rope_angles(positions, frequencies);
  const OnDevice on(positions);
  const Tensor where = torch::stable::contiguous(positions), turns = as_float(frequencies, kOp, "frequencies");
  const Tensor angles = empty_on(positions, sizes, ScalarType::Float);
  rope::launch(rope::CudaAngles{data<int64_t>(where), data<float>(turns), mutable_data<float>(angles), where.numel(),
                                turns.size(0), static_cast<float>(gain)},
               stream_of(positions));
  return angles;
}

void rope_rotate(const Tensor& x, const Tensor& angles, const std::optional<Tensor>& scales) {
  constexpr const char* kOp = "rope_rotate_";
  require_device(x, kOp, "x");
  require_same_device(angles, x, kOp, "angles");
  if (scales.has_value()) require_same_device(*scales, x, kOp, "scales");
  const int64_t heads_per_scale = check_rope_rotate(x, angles, scales);
  const OnDevice on(x);
  const Tensor turns = torch::stable::contiguous(angles);
  const std::optional<Tensor> factors =
      scales.has_value() ? std::optional<Tensor>(as_float(*scales, kOp, "scales")) : std::nullopt;
  rope::launch(rope::CudaRotation{mutable_data<float>(x), data<float>(turns),
                                  factors.has_value() ? data<float>(*factors) : nullptr, x.size(0), x.size(1),
                                  x.size(2), heads_per_scale},
               stream_of(x));
}

Tensor gated_activation(const Tensor& gate, const Tensor& up) {
  constexpr const char* kOp = "gated_activation";
  require_device(gate, kOp, "gate");
  require_same_device(up, gate, kOp, "up");
  check_gated_activation(gate, up);
  const OnDevice on(gate);
  const Tensor g = as_float(gate, kOp, "gate"), u = as_float(up, kOp, "up");
  const Tensor y = empty_on(gate, sizes_of(gate), ScalarType::Float);
  gated_activation::launch({data<float>(g), data<float>(u), mutable_data<float>(y), gate.numel()}, stream_of(gate));
  return torch::stable::to(y, gate.scalar_type());
}

}  // namespace

TILEWRIGHT_DEVICE_OPERATORS(m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rope_angles", TORCH_BOX(&rope_angles));
  m.impl("rope_rotate_", TORCH_BOX(&rope_rotate));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
}

}  // namespace tilewright::torch_adapter
