// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/sparse_gated_mlp/problem.h"

namespace tilewright::sparse_gated_mlp {

// act of one value, and whether it is kept.
double reference_activation(Function function, double z);
bool reference_kept(double a, double threshold);

// activation, kept and y in float64, row after row; the list of rows and h are not used.
void reference(const Problem<double, double>& problem);

}  // namespace tilewright::sparse_gated_mlp
