// SPDX-License-Identifier: Apache-2.0
// The emulator's settings by plain C names, for Python's ctypes.
#include "emulator/control.h"

#define TILEWRIGHT_EXPORT extern "C" __attribute__((visibility("default")))

using tilewright::emulator::current_settings;

TILEWRIGHT_EXPORT void tilewright_emulator_configure(uint64_t seed, int multiprocessors, int strict) {
  current_settings().seed = seed;
  current_settings().multiprocessors = multiprocessors;
  current_settings().strict = strict != 0;
}

// Before an operator: what earlier ones allowed their kernels to touch is theirs no longer.
TILEWRIGHT_EXPORT void tilewright_emulator_forget_memory() { tilewright::emulator::forget_all_global(); }

TILEWRIGHT_EXPORT uint64_t tilewright_emulator_launches() { return current_settings().launches; }
