// SPDX-License-Identifier: Apache-2.0
// The CUDA side of the operator library. It holds one operator, which says what the binary was built for; a doctor's
// question that also proves the build, the link and the loading on machines with and without a GPU.
#include <cuda_runtime.h>

#include <string>

#include "torch/tensors.h"

namespace tilewright::torch_adapter {
namespace {

std::string cuda_build_info(const Tensor& on_device) {
  int runtime = 0;
  cudaRuntimeGetVersion(&runtime);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on_device.get_device_index(), &stream));
  return "sm_90a runtime=" + std::to_string(runtime);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) { m.def("cuda_build_info(Tensor on_device) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(tilewright, CUDA, m) { m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info)); }

}  // namespace tilewright::torch_adapter
