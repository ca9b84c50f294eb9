// SPDX-License-Identifier: Apache-2.0
// Starting a kernel: from CUDA, or in the emulator, which runs it to its end.
#pragma once

#include "core/require.h"
#include "hopper/platform.h"
#include "hopper/stream.h"

namespace tilewright::hopper {

struct Blocks {
  int64_t x = 1;
  int y = 1, z = 1;
};

struct Grid {
  Blocks blocks;
  int threads = 0;
  int cluster = 1;  // blocks of a cluster, along x
  int shared_bytes = 0;
  Stream stream;
  bool overlap = false;  // start while the previous kernel of the stream still runs; see wait_for_previous_kernel
};

// Most bytes of dynamic shared memory that a block may have.
inline constexpr int kMaxSharedBytes = 232448;

#if defined(__CUDACC__)

namespace detail {

inline void check(cudaError_t status, const char* what) {
  require(status == cudaSuccess, what, " failed: ", cudaGetErrorString(status));
}

}  // namespace detail

// Params is the kernel's one parameter, a plain struct. A grid without blocks is nothing to do.
template <class Params>
void launch(void (*kernel)(Params), const Grid& grid, const Params& params) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  require(grid.blocks.x <= 2147483647 && grid.blocks.y <= 65535 && grid.blocks.z <= 65535, "a grid of ", grid.blocks.x,
          " x ", grid.blocks.y, " x ", grid.blocks.z, " blocks is more than CUDA takes; split the input");
  if (grid.shared_bytes > 48 * 1024) {
    detail::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes),
                  "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks.x), static_cast<unsigned>(grid.blocks.y),
                        static_cast<unsigned>(grid.blocks.z));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(grid.stream.handle);
  config.attrs = attributes;
  if (grid.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    ++config.numAttrs;
  }
  if (grid.overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  detail::check(cudaLaunchKernelEx(&config, kernel, params), "a kernel launch");
}

// Of the current device; read once.
inline int multiprocessors() {
  static const int count = [] {
    int device = 0, value = 0;
    detail::check(cudaGetDevice(&device), "cudaGetDevice");
    detail::check(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return value;
  }();
  return count;
}

#else
#include "emulator/launch.h"
#endif

}  // namespace tilewright::hopper
