// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL generic
#include "ops/feature_map/cpu/body.h"
