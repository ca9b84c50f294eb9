// SPDX-License-Identifier: Apache-2.0
#define TILEWRIGHT_LEVEL generic
#include "ops/sorted_w2/cpu/body.h"
