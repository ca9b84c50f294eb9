// SPDX-License-Identifier: Apache-2.0
// The few functions of the CUDA runtime that a test program on a GPU needs, for the same program in the emulator.
#pragma once

#include <cstdlib>
#include <cstring>

#include "emulator/control.h"

using cudaError_t = int;
inline constexpr int cudaSuccess = 0;
inline constexpr int cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2;

// The room around is asked for on purpose: 256-byte alignment as cudaMalloc gives.
template <class T>
int cudaMalloc(T** pointer, size_t bytes) {
  *pointer = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  tilewright::emulator::register_global(*pointer, bytes, true);
  return 0;
}
inline int cudaFree(void* pointer) {
  tilewright::emulator::forget_global(pointer);
  std::free(pointer);
  return 0;
}
inline int cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  std::memcpy(to, from, bytes);
  return 0;
}
inline int cudaDeviceSynchronize() { return 0; }
inline const char* cudaGetErrorString(int) { return "an error of CUDA"; }
