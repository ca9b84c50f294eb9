// SPDX-License-Identifier: Apache-2.0
// Everything a kernel source needs of the machine.
#pragma once

#include "hopper/barrier.h"
#include "hopper/copy.h"
#include "hopper/launch.h"
#include "hopper/mma.h"
#include "hopper/shared.h"
#include "hopper/tma.h"
#include "hopper/types.h"
#include "hopper/wgmma.h"
