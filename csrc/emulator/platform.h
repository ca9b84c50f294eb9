// SPDX-License-Identifier: Apache-2.0
// The host half of hopper/platform.h: what a kernel source may name when a C++ compiler reads it.
#pragma once

#include "emulator/cuda_names.h"
#include "emulator/numbers.h"
#include "emulator/runtime.h"
