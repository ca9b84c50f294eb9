// SPDX-License-Identifier: Apache-2.0
// Checks of ternary arguments that hold on every device.
#pragma once

#include "ops/ternary_linear/problem.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter {

inline void require_ternary_blob(const Tensor& data, const char* op) {
  require_dtype(data, ScalarType::Byte, op, "data");
  require_dim(data, 1, op, "data", "the one-dimensional blob of pack_ternary()");
  require(data.is_contiguous(), op, ": data must be contiguous; pass the blob of pack_ternary() itself");
}

inline void require_ternary_columns(int64_t k, const char* op) {
  require(k <= ternary_linear::kMaxK, op, ": K = ", k, ", sums of more than ", ternary_linear::kMaxK,
          " columns do not fit 32 bits; split K");
}

inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

inline void require_codes(const Tensor& x, int64_t k, const char* op) {
  require_dtype(x, ScalarType::Char, op, "x");
  require(x.dim() >= 1, op, ": x is a scalar, needed [..., K] with K = ", k);
  require_size(x, x.dim() - 1, k, op, "x", "K");
}

struct LinearArguments {
  ScalarType out;
};

inline LinearArguments check_linear(const Tensor& x, int64_t n, int64_t k, const Tensor& scale,
                                    const std::optional<Tensor>& bias, std::optional<ScalarType> out_dtype,
                                    const char* op) {
  require(x.dim() >= 1, op, ": x is a scalar, needed [..., K] with K = ", k);
  require_size(x, x.dim() - 1, k, op, "x", "K");
  require_dim(scale, 1, op, "scale", "[1] or [N]");
  require(scale.size(0) == 1 || scale.size(0) == n, op, ": scale has shape ", shape_of(scale),
          ", needed [1] or [N] = [", n, "]");
  if (bias.has_value()) {
    require_dim(*bias, 1, op, "bias", "[N]");
    require_size(*bias, 0, n, op, "bias", "N");
  }
  const ScalarType out = out_dtype.value_or(x.scalar_type());
  require(is_floating(x.scalar_type()), op, ": x has dtype ", dtype_name(x.scalar_type()),
          ", needed float32, bfloat16, float16 or float64; ternary_matmul takes int8");
  require(is_floating(out), op, ": out_dtype is ", dtype_name(out), ", needed float32, bfloat16, float16 or float64");
  return {out};
}

}  // namespace tilewright::torch_adapter
