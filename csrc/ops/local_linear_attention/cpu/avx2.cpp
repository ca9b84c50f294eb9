// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL avx2
#include "ops/local_linear_attention/cpu/body.h"
