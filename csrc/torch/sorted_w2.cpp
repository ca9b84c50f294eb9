// SPDX-License-Identifier: Apache-2.0
// sorted_w2: each column's squared 2-Wasserstein distance and its gradient with respect to z.
#include <tuple>

#include "ops/sorted_w2/kernels.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter {
namespace {

using sorted_w2::kColumns;
using sorted_w2::kMaxSamples;
using sorted_w2::Pair;
using sorted_w2::Problem;

constexpr const char* kOp = "sorted_w2";
constexpr int64_t kBlocksPerThread = 4;

void check_samples(const Tensor& x, const char* argument) {
  require_cpu(x, kOp, argument);
  require_dim(x, 2, kOp, argument, "[samples, D]");
  require(x.size(0) >= 1 && x.size(0) <= kMaxSamples, kOp, ": ", argument, " has shape ", shape_of(x), ", needed 1 to ",
          kMaxSamples, " samples; tilewright.ops.sorted_w2 sorts more with torch");
}

// The breakpoints i/n and j/m merged: in units of 1/(n m) they are whole numbers.
void couple(int64_t n, int64_t m, std::vector<int64_t>& first, std::vector<Pair>& pairs) {
  int64_t at = 0, i = 0, j = 0;
  while (i < n) {
    first.push_back(static_cast<int64_t>(pairs.size()));
    const int64_t end = (i + 1) * m;
    while (at < end) {
      const int64_t next = std::min(end, (j + 1) * n);
      pairs.push_back({j, static_cast<double>(next - at) / (static_cast<double>(n) * static_cast<double>(m))});
      at = next;
      if (at == (j + 1) * n) ++j;
    }
    ++i;
  }
  first.push_back(static_cast<int64_t>(pairs.size()));
}

template <class T>
void run(const Tensor& z, const Tensor& v, const Tensor& cost, const Tensor& gradient) {
  std::vector<int64_t> first;
  std::vector<Pair> pairs;
  couple(z.size(0), v.size(0), first, pairs);
  const Problem<T> problem{
      .n = z.size(0),
      .m = v.size(0),
      .columns = z.size(1),
      .z = data<T>(z),
      .z_stride = z.stride(0),
      .v = data<T>(v),
      .v_stride = v.stride(0),
      .first = first.data(),
      .pairs = pairs.data(),
      .cost = mutable_data<T>(cost),
      .gradient = mutable_data<T>(gradient),
  };
  const auto kernel = sorted_w2::kernel<T>();
  const int64_t blocks = (problem.columns + kColumns - 1) / kColumns;
  torch::stable::parallel_for(0, blocks, kBlocksPerThread,
                              [&](int64_t from, int64_t to) { kernel(problem, from, to); });
}

std::tuple<Tensor, Tensor> sorted_w2_op(const Tensor& z, const Tensor& v) {
  check_samples(z, "z");
  check_samples(v, "v");
  require_size(v, 1, z.size(1), kOp, "v", "D");
  const ScalarType type = z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor samples = with_adjacent_rows(z, type, kOp, "z"), wanted = with_adjacent_rows(v, type, kOp, "v");
  const Tensor cost = empty_cpu({z.size(1)}, type), gradient = empty_cpu({z.size(0), z.size(1)}, type);
  if (z.size(1) > 0) {
    type == ScalarType::Double ? run<double>(samples, wanted, cost, gradient)
                               : run<float>(samples, wanted, cost, gradient);
  }
  return {cost, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) { m.def("sorted_w2(Tensor z, Tensor v) -> (Tensor, Tensor)"); }

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) { m.impl("sorted_w2", TORCH_BOX(&sorted_w2_op)); }

}  // namespace tilewright::torch_adapter
