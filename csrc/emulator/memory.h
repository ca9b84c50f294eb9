// SPDX-License-Identifier: Apache-2.0
// Checks of single accesses, for the hooks. Internal to the emulator.
#pragma once

#include "emulator/state.h"

namespace tilewright::emulator {

extern uintptr_t shared_arena;

void read_shared(Block& block, uint32_t offset, uint32_t bytes, const char* what);
void write_shared(Block& block, uint32_t offset, uint32_t bytes, const char* what);
void check_access(const void* pointer, size_t bytes, bool writes, const char* what);
void check_registers(const Fiber& fiber, const void* pointer, size_t bytes, bool writes);
// The instruction of the kernel whose access is being checked, and its place in the library: what addr2line takes.
extern const void* instruction;
size_t image_offset(const void* address);
// Constants and variables of the program itself, such as threadIdx and tables.
bool is_program_data(const void* pointer);

}  // namespace tilewright::emulator
