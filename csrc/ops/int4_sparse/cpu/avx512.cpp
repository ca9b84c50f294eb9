// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL avx512
#include "ops/int4_sparse/cpu/body.h"
