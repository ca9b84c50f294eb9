// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL generic
#include "ops/sparse_gated_mlp/cpu/body.h"
