// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL generic
#include "ops/activation_map/cpu/body.h"
