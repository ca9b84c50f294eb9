# SPDX-License-Identifier: Apache-2.0
# Kernels and their torch adapters that run on a GPU, or in the emulator of one: the same sources for both libraries.
# Every room's cuda folder belongs to them, so that a new kernel is listed nowhere.
file(GLOB TILEWRIGHT_DEVICE_SOURCES CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/csrc/ops/*/cuda/*.cu" "${PROJECT_SOURCE_DIR}/csrc/ops/*/cuda/*.cpp"
  "${PROJECT_SOURCE_DIR}/csrc/torch/cuda/*.cpp")
