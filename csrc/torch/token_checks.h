// SPDX-License-Identifier: Apache-2.0
// What the token operators ask of their shapes, on any device.
#pragma once

#include "torch/tensors.h"

namespace tilewright::torch_adapter {

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// Gives K.
inline int64_t check_rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  constexpr const char* kOp = "rms_norm";
  require_dim(weight, 1, kOp, "weight", "[K]");
  const int64_t width = weight.size(0);
  require(width > 0, kOp, ": weight is empty, needed at least one column");
  require(x.dim() >= 1, kOp, ": x is a scalar, needed [..., K] with K = ", width);
  require_size(x, x.dim() - 1, width, kOp, "x", "K");
  require(eps >= 0.0, kOp, ": eps = ", eps, ", needed a number >= 0");
  return width;
}

// Gives the shape of the angles, [..., 2, P].
inline std::vector<int64_t> check_rope_angles(const Tensor& positions, const Tensor& frequencies) {
  constexpr const char* kOp = "rope_angles";
  require_dtype(positions, ScalarType::Long, kOp, "positions");
  require_dim(frequencies, 1, kOp, "frequencies", "[P]");
  std::vector<int64_t> sizes = sizes_of(positions);
  sizes.insert(sizes.end(), {2, frequencies.size(0)});
  return sizes;
}

// Gives the heads that share a row of scales, 1 without them.
inline int64_t check_rope_rotate(const Tensor& x, const Tensor& angles, const std::optional<Tensor>& scales) {
  constexpr const char* kOp = "rope_rotate_";
  require_dtype(x, ScalarType::Float, kOp, "x");
  require_dim(x, 3, kOp, "x", "[T, H, D]");
  require(x.is_contiguous(), kOp, ": x is rotated in place and must be contiguous; call .contiguous() once");
  require(x.size(2) % 2 == 0, kOp, ": x has D = ", x.size(2), ", needed an even number: channels turn in pairs");
  require_dtype(angles, ScalarType::Float, kOp, "angles");
  require_dim(angles, 3, kOp, "angles", "[T, 2, D/2] of rope_angles");
  require_size(angles, 0, x.size(0), kOp, "angles", "T");
  require_size(angles, 1, 2, kOp, "angles", "cosines and sines");
  require_size(angles, 2, x.size(2) / 2, kOp, "angles", "D/2");
  if (!scales.has_value()) return 1;
  require_dim(*scales, 2, kOp, "scales", "[H or a divisor of it, D]");
  require_size(*scales, 1, x.size(2), kOp, "scales", "D");
  require(scales->size(0) > 0 && x.size(1) % scales->size(0) == 0, kOp, ": scales has ", scales->size(0),
          " rows, which do not divide the H = ", x.size(1), " heads of x");
  return x.size(1) / scales->size(0);
}

inline void check_gated_activation(const Tensor& gate, const Tensor& up) {
  constexpr const char* kOp = "gated_activation";
  require(sizes_of(gate) == sizes_of(up), kOp, ": gate has shape ", shape_of(gate), ", up ", shape_of(up),
          "; they must be the same");
  require(gate.dim() >= 1, kOp, ": gate is a scalar, needed [..., K]");
}

}  // namespace tilewright::torch_adapter
