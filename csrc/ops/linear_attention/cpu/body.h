// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/simd.h. Turns the problem's rule and decay into template arguments.
#pragma once

#include "ops/linear_attention/cpu/backward.h"
#include "ops/linear_attention/cpu/forward.h"
#include "ops/linear_attention/cpu/recurrent.h"
#include "ops/linear_attention/kernels.h"

namespace tilewright::linear_attention {
namespace {

// Calls visit.operator()<rule, decay>().
template <class T, class Visit>
void dispatch(const Problem<T>& p, const Visit& visit) {
  const auto with_rule = [&]<Rule kRule>() {
    switch (p.decay) {
      case Decay::kNone: return visit.template operator()<kRule, Decay::kNone>();
      case Decay::kToken: return visit.template operator()<kRule, Decay::kToken>();
      case Decay::kChannel: return visit.template operator()<kRule, Decay::kChannel>();
    }
  };
  p.rule == Rule::kDelta ? with_rule.template operator()<Rule::kDelta>()
                         : with_rule.template operator()<Rule::kAdditive>();
}

template <class T>
void chunk(const Problem<T>& p, int64_t task) {
  dispatch(p, [&]<Rule kRule, Decay kDecay>() { Forward<T, kRule, kDecay>(p, task).run(); });
}

template <class T>
void recurrent(const Problem<T>& p, int64_t task) {
  dispatch(p, [&]<Rule kRule, Decay kDecay>() { Recurrent<T, kRule, kDecay>(p, task).run(); });
}

template <class T>
void backward(const Problem<T>& p, const Gradients<T>& gradients, int64_t task) {
  dispatch(p, [&]<Rule kRule, Decay kDecay>() { Backward<T, kRule, kDecay>(p, gradients, task).run(); });
}

}  // namespace

namespace TILEWRIGHT_LEVEL {

const Kernels<float> kFloat{chunk<float>, recurrent<float>, backward<float>};
const Kernels<double> kDouble{chunk<double>, recurrent<double>, backward<double>};

}  // namespace TILEWRIGHT_LEVEL
}  // namespace tilewright::linear_attention
