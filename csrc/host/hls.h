// SPDX-License-Identifier: Apache-2.0
// C simulation of the accelerator's HLS units, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace tilewright {

void bind_hls(pybind11::module_& parent);

}  // namespace tilewright
