// SPDX-License-Identifier: Apache-2.0
// A CUDA stream for code that includes no CUDA header.
#pragma once

namespace tilewright::hopper {

struct Stream {
  void* handle = nullptr;  // cudaStream_t; the emulator runs every launch at once and reads nothing
};

}  // namespace tilewright::hopper
