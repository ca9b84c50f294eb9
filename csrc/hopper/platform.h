// SPDX-License-Identifier: Apache-2.0
// Where kernel sources are compiled: by nvcc for the GPU, or by a C++ compiler for the emulator, which gives CUDA's own
// names (threadIdx, __syncthreads, __shfl_xor_sync, ...) a meaning on the host.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define TILEWRIGHT_DEVICE __device__ __forceinline__
#define TILEWRIGHT_BOTH __host__ __device__ __forceinline__
#elif defined(TILEWRIGHT_EMULATOR)
#include "emulator/platform.h"
#define TILEWRIGHT_DEVICE inline
#define TILEWRIGHT_BOTH inline
#else
#error \
    "kernel sources are compiled by nvcc or for the emulator; host code includes hopper/stream.h and a kernel's launch.h"
#endif
