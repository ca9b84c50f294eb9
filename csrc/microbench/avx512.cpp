// SPDX-License-Identifier: Apache-2.0
#include "microbench/avx512.h"

namespace tilewright::microbench::avx512 {

const Loops loops{read, int8, floating, floating, 128 * kChains, 32 * kChains, 32 * kChains};

}  // namespace tilewright::microbench::avx512
