// SPDX-License-Identifier: Apache-2.0
#include "ops/local_linear_attention/cuda/decode_solve.cuh"

namespace tilewright::local_linear_attention::cuda {
namespace {

constexpr int kManyRows = 4;  // of a cluster where a key head has more than one

int lanes_for(int64_t width) {
  int lanes = 1;
  while (lanes * kOwnElements < width) lanes *= 2;
  return lanes;
}

template <class T, int Rows>
void launch_decode(const Decode& d, const DecodePlan& plan, const Sequences& sequences, hopper::Stream stream) {
  DecodeParams<T> params{};
  params.shape = d.shape;
  params.options = d.options;
  params.sequences = sequences;
  params.q = static_cast<const T*>(d.q);
  params.k = static_cast<const T*>(d.k);
  params.v = static_cast<const T*>(d.v);
  params.ridge = d.ridge;
  params.start = d.start;
  params.o = static_cast<T*>(d.o);
  params.x = d.x;
  params.rows = d.rows;
  params.iterations = d.iterations;
  params.scores = d.scores;
  params.partials = d.partials;
  params.width = plan.width;
  params.lanes = plan.lanes;
  params.chunks = plan.chunks;
  hopper::launch(decode<T, Rows>,
                 hopper::Grid{.blocks = {plan.clusters * kDecodeCluster},
                              .threads = kDecodeThreads,
                              .cluster = kDecodeCluster,
                              .shared_bytes = plan.shared_bytes,
                              .stream = stream},
                 params);
}

template <class T>
void launch_decode(const Decode& d, const DecodePlan& plan, const Sequences& sequences, hopper::Stream stream) {
  if (plan.rows == 1) {
    launch_decode<T, 1>(d, plan, sequences, stream);
  } else {
    launch_decode<T, kManyRows>(d, plan, sequences, stream);
  }
}

}  // namespace

DecodePlan plan_decode(const Shape& shape, const Options& options, const Sequences& sequences, int element_bytes) {
  constexpr int64_t kMostQueries = 16;  // above, tiles of queries are better
  DecodePlan plan{};
  const int64_t width = shape.key_size > shape.value_size ? shape.key_size : shape.value_size;
  const int piece = 16 / element_bytes;
  plan.takes = options.solver == Solver::kConjugateGradient && !options.jacobi && width <= kMostDecodeSize &&
               element_bytes <= 4 && shape.key_size % piece == 0 && shape.value_size % piece == 0 &&
               shape.value_size > 0 && sequences.queries <= kMostQueries && sequences.offsets == nullptr;
  if (!plan.takes) return plan;
  const int64_t rows = sequences.queries * (shape.heads / shape.kv_heads);
  plan.rows = rows == 1 ? 1 : kManyRows;
  plan.chunks = (rows + plan.rows - 1) / plan.rows;
  plan.clusters = sequences.count * shape.kv_heads * plan.chunks;
  plan.width = static_cast<int>(width);
  plan.lanes = lanes_for(width);
  const int key_size = static_cast<int>(shape.key_size);
  const int floats = plan.rows == 1 ? DecodeMemory<1>::floats(key_size, plan.width)
                                    : DecodeMemory<kManyRows>::floats(key_size, plan.width);
  plan.shared_bytes = floats * static_cast<int>(sizeof(float));
  plan.partials = plan.clusters * 2 * kDecodeCluster * plan.rows * (plan.width + 2);
  return plan;
}

void decode(const Decode& problem, const DecodePlan& plan, const Sequences& sequences, hopper::Stream stream) {
  if (sequences.rows == 0) return;
  if (problem.type == Storage::kFloat) {
    launch_decode<float>(problem, plan, sequences, stream);
  } else if (problem.type == Storage::kHalf) {
    launch_decode<hopper::f16>(problem, plan, sequences, stream);
  } else {
    launch_decode<hopper::bf16>(problem, plan, sequences, stream);
  }
}

}  // namespace tilewright::local_linear_attention::cuda
