# SPDX-License-Identifier: Apache-2.0
# Kernels and their torch adapters that run on a GPU, or in the emulator of one: the same sources for both libraries.
set(TILEWRIGHT_DEVICE_SOURCES
  csrc/ops/int4_linear/cuda/launch.cu
  csrc/ops/int4_linear/cuda/launch_fold.cu
  csrc/ops/int4_linear/cuda/launch_signed.cu
  csrc/ops/int4_linear/cuda/launch_unsigned.cu
  csrc/torch/cuda/int4_linear.cpp
)
list(TRANSFORM TILEWRIGHT_DEVICE_SOURCES PREPEND "${PROJECT_SOURCE_DIR}/")
