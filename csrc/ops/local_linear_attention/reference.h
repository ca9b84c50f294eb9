// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "ops/local_linear_attention/problem.h"

namespace tilewright::local_linear_attention {

// The C++ oracle of the forward pass: the paper's normal equations of every row, Sigma rho = mu, by Gaussian elimination
// in double. Writes o only; the solver's options are not read.
void reference(const Forward<double>& problem, const std::vector<Segment>& segments);

}  // namespace tilewright::local_linear_attention
