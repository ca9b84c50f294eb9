// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL avx2
#include "ops/int4_sparse/cpu/body.h"
