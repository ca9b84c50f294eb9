// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL avx512
#include "ops/local_linear_attention/cpu/body.h"
