// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL avx512
#include "ops/activation_map/cpu/body.h"
