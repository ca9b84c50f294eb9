// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL avx2
#include "ops/feature_map/cpu/body.h"
