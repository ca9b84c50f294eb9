// SPDX-License-Identifier: Apache-2.0
// One operator of the emulator's own: a doctor's question, and proof that the library loads beside torch.
#include "emulator/control.h"
#include "torch/cuda/device.h"

namespace tilewright::torch_adapter {
namespace {

std::string emulator_build_info(const Tensor& on_device) {
  require_device(on_device, "emulator_build_info", "on_device");
  return "host emulator of sm_90a, " + std::to_string(emulator::current_settings().launches) + " launches so far";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) { m.def("emulator_build_info(Tensor on_device) -> str"); }

TILEWRIGHT_DEVICE_OPERATORS(m) { m.impl("emulator_build_info", TORCH_BOX(&emulator_build_info)); }

}  // namespace tilewright::torch_adapter
