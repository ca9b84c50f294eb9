# SPDX-License-Identifier: Apache-2.0
# Kernels and their torch adapters that run on a GPU, or in the emulator of one: the same sources for both libraries.
set(TILEWRIGHT_DEVICE_SOURCES
  csrc/ops/gated_activation/cuda/launch.cu
  csrc/ops/rms_norm/cuda/launch.cu
  csrc/ops/rope/cuda/launch.cu
  csrc/torch/cuda/token_ops.cpp
)
list(TRANSFORM TILEWRIGHT_DEVICE_SOURCES PREPEND "${PROJECT_SOURCE_DIR}/")
