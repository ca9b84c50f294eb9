# SPDX-License-Identifier: Apache-2.0
# Kernels and their torch adapters that run on a GPU, or in the emulator of one: the same sources for both libraries.
set(TILEWRIGHT_DEVICE_SOURCES
  csrc/ops/local_linear_attention/cuda/flash.cu
  csrc/ops/local_linear_attention/cuda/plain.cu
  csrc/torch/cuda/local_linear_attention.cpp
)
list(TRANSFORM TILEWRIGHT_DEVICE_SOURCES PREPEND "${PROJECT_SOURCE_DIR}/")
