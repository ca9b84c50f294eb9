// SPDX-License-Identifier: Apache-2.0
// Between torch's stable ABI and plain pointers: checks, dtype conversion at the edge, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "core/require.h"
#if defined(TILEWRIGHT_EMULATOR)
#include "emulator/control.h"
#endif

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
// The library's own `to` and `contiguous` cost a dispatch each even where there is nothing to do.
inline Tensor to_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

inline Tensor contiguous_of(const Tensor& tensor, ScalarType type) {
  const Tensor typed = to_type(tensor, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

inline Tensor as_float(const Tensor& tensor, const char* op, const char* argument) {
  require(is_floating(tensor.scalar_type()), op, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
          ", needed float32, bfloat16, float16 or float64");
  return contiguous_of(tensor, ScalarType::Float);
}

// In the emulator, whatever memory an adapter takes the address of is what its kernels may touch.
inline void allow_kernels([[maybe_unused]] const Tensor& tensor, [[maybe_unused]] bool to_write) {
#if defined(TILEWRIGHT_EMULATOR)
  int64_t elements = tensor.numel() > 0 ? 1 : 0;
  for (int64_t d = 0; d < tensor.dim() && elements > 0; ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
  emulator::register_global(tensor.const_data_ptr(), static_cast<size_t>(elements) * tensor.element_size(), to_write);
#endif
}

template <class T>
const T* data(const Tensor& tensor) {
  allow_kernels(tensor, false);
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  allow_kernels(tensor, true);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor empty_cpu(const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

template <class T>
constexpr ScalarType scalar_type_of() {
  return sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
}

// The tensor in the given dtype with adjacent elements in its last dimension: a copy only where one is needed.
inline Tensor with_adjacent_rows(const Tensor& tensor, ScalarType type, const char* op, const char* argument) {
  require(is_floating(tensor.scalar_type()), op, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
          ", needed float32, bfloat16, float16 or float64");
  const Tensor converted = to_type(tensor, type);
  const int64_t last = converted.dim() - 1;
  return converted.size(last) <= 1 || converted.stride(last) == 1 ? converted : torch::stable::contiguous(converted);
}

// cu_seqlens as int64, checked against T.
inline Tensor offsets_of(const Tensor& cu_seqlens, int64_t sequences, int64_t tokens, const char* op) {
  require_cpu(cu_seqlens, op, "cu_seqlens");
  const ScalarType type = cu_seqlens.scalar_type();
  require(type == ScalarType::Long || type == ScalarType::Int, op, ": cu_seqlens has dtype ", dtype_name(type),
          ", needed int64 or int32");
  require_dim(cu_seqlens, 1, op, "cu_seqlens", "[S+1]");
  require_size(cu_seqlens, 0, sequences + 1, op, "cu_seqlens", "S+1");
  const Tensor offsets = contiguous_of(cu_seqlens, ScalarType::Long);
  const auto* at = data<int64_t>(offsets);
  require(at[0] == 0, op, ": cu_seqlens starts at ", at[0], ", needed 0");
  for (int64_t s = 0; s < sequences; ++s) {
    require(at[s] <= at[s + 1], op, ": cu_seqlens falls from ", at[s], " to ", at[s + 1], " at sequence ", s,
            ", needed non-decreasing offsets");
  }
  require(at[sequences] <= tokens, op, ": cu_seqlens ends at ", at[sequences], ", but there are only T = ", tokens,
          " tokens");
  return offsets;
}

// Runs task(i) for i in [0, tasks) on torch's threads, whoever is free takes the next: packed sequences differ in length.
template <class Task>
void run_tasks(int64_t tasks, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) task(i);
  });
}

}  // namespace tilewright::torch_adapter
