// SPDX-License-Identifier: Apache-2.0
// Between torch's stable ABI and plain pointers: checks, dtype conversion at the edge, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "core/require.h"

namespace tilewright::torch_adapter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d == 0 ? "" : ", ") << tensor.size(d);
  text << ']';
  return text.str();
}

inline const char* dtype_name(ScalarType type) { return torch::headeronly::toString(type); }

inline void require_cpu(const Tensor& tensor, const char* op, const char* argument) {
  require(tensor.is_cpu(), op, ": ", argument,
          " is not on the CPU; move it with .cpu() (this build has no kernel for "
          "its device)");
}

inline void require_dtype(const Tensor& tensor, ScalarType wanted, const char* op, const char* argument) {
  require(tensor.scalar_type() == wanted, op, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
          ", needed ", dtype_name(wanted), "; convert it with .to()");
}

inline void require_dim(const Tensor& tensor, int64_t wanted, const char* op, const char* argument,
                        const char* layout) {
  require(tensor.dim() == wanted, op, ": ", argument, " has shape ", shape_of(tensor), ", needed ", layout);
}

inline void require_size(const Tensor& tensor, int64_t dim, int64_t wanted, const char* op, const char* argument,
                         const char* letter) {
  require(tensor.size(dim) == wanted, op, ": ", argument, " has shape ", shape_of(tensor), ", but its dimension ", dim,
          " must be ", letter, " = ", wanted);
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

// Contiguous float32 copy of a floating tensor, or the tensor itself.
inline Tensor as_float(const Tensor& tensor, const char* op, const char* argument) {
  require(is_floating(tensor.scalar_type()), op, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
          ", needed float32, bfloat16, float16 or float64");
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor empty_cpu(const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

}  // namespace tilewright::torch_adapter
