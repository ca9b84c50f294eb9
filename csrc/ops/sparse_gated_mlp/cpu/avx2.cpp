// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL avx2
#include "ops/sparse_gated_mlp/cpu/body.h"
