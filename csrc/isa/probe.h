// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace tilewright::isa {

// Index of the highest usable level. Compiled apart, for the baseline processor and without link-time optimisation, so
// that no wider instruction can reach it.
int probe_cpu();

}  // namespace tilewright::isa
