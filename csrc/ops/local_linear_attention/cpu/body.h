// SPDX-License-Identifier: Apache-2.0
// Compiled once a level; see isa/simd.h.
#include "ops/local_linear_attention/cpu/backward_keys.h"

namespace tilewright::local_linear_attention {
namespace {

template <class T>
void forward_items(const Forward<T>& problem, const Plan& plan, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) forward_block(problem, block_item(plan, i));
  trim_thread_memory();
}

template <class T>
void backward_query_items(const Backward<T>& problem, const Plan& plan, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) backward_block(problem, block_item(plan, i));
  trim_thread_memory();
}

template <class T>
void backward_key_items(const Backward<T>& problem, const Plan& plan, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) backward_tile(problem, plan, key_item(plan, i));
  trim_thread_memory();
}

}  // namespace

namespace TILEWRIGHT_LEVEL {
const Kernels<float> kFloat{forward_items<float>, backward_query_items<float>, backward_key_items<float>};
const Kernels<double> kDouble{forward_items<double>, backward_query_items<double>, backward_key_items<double>};
}  // namespace TILEWRIGHT_LEVEL

}  // namespace tilewright::local_linear_attention
