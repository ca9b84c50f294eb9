// SPDX-License-Identifier: Apache-2.0
// The host half of hopper/shared.h; included inside its namespace.

inline char* shared_memory() { return emulator::shared_memory(); }
inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }
