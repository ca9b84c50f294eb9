// SPDX-License-Identifier: Apache-2.0
// Operators that concern the library itself.
#include "isa/isa.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter {
namespace {

// "" puts the default back. Returns the level now active.
std::string set_isa(std::string name) {
  isa::set_active(name);
  return isa::name(isa::active());
}

}  // namespace

STABLE_TORCH_LIBRARY(tilewright, m) { m.def("set_isa(str name) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(tilewright, CompositeExplicitAutograd, m) { m.impl("set_isa", TORCH_BOX(&set_isa)); }

}  // namespace tilewright::torch_adapter
