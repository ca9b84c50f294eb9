// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL avx512
#include "ops/gated_activation/cpu/body.h"
