// SPDX-License-Identifier: Apache-2.0
// Simulation of the accelerator's RTL, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace tilewright {

void bind_rtl(pybind11::module_& parent);

}  // namespace tilewright
