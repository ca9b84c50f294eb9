// SPDX-License-Identifier: Apache-2.0
// What the adapters of CUDA kernels share. They are compiled twice: into the CUDA library, and into the emulator's, where
// the "device" is the CPU and operators are registered under a dispatch key that nothing else uses.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "hopper/stream.h"
#include "torch/tensors.h"

#if defined(TILEWRIGHT_EMULATOR)
#define TILEWRIGHT_DEVICE_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(tilewright, PrivateUse1, m)
#else
#define TILEWRIGHT_DEVICE_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(tilewright, CUDA, m)
#endif

namespace tilewright::torch_adapter {

#if defined(TILEWRIGHT_EMULATOR)

inline void require_device(const Tensor& tensor, const char* op, const char* argument) {
  require(tensor.is_cpu(), op, ": ", argument, " is not on the CPU, where the emulator reads");
}

inline hopper::Stream stream_of(const Tensor& /*tensor*/) { return {}; }

struct OnDevice {
  explicit OnDevice(const Tensor& /*tensor*/) {}
};

#else

inline void require_device(const Tensor& tensor, const char* op, const char* argument) {
  require(tensor.is_cuda(), op, ": ", argument,
          " is not on a CUDA device, but other arguments are; move it with .cuda()");
}

// The stream that the caller works on.
inline hopper::Stream stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return {stream};
}

// While it lives, the tensor's device is the current one: launches and allocations go there.
class [[gnu::visibility("hidden")]] OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

inline void require_same_device(const Tensor& tensor, const Tensor& other, const char* op, const char* argument) {
  require_device(tensor, op, argument);
  require(tensor.get_device_index() == other.get_device_index(), op, ": ", argument, " is on device ",
          tensor.get_device_index(), ", but other arguments are on ", other.get_device_index());
}

inline Tensor empty_on(const Tensor& where, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, where.device());
}

inline Tensor zeros_on(const Tensor& where, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_zeros(where, sizes, type);
}

}  // namespace tilewright::torch_adapter
