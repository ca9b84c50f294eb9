// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL avx512
#include "ops/feature_map/cpu/body.h"
