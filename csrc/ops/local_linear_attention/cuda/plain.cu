// SPDX-License-Identifier: Apache-2.0
#include "ops/local_linear_attention/cuda/row_backward.cuh"
#include "ops/local_linear_attention/cuda/row_forward.cuh"

namespace tilewright::local_linear_attention::cuda {
namespace {

// Blocks of a grid whose matrices lie in the workspace: enough to fill the chip, few enough to be small.
constexpr int64_t kWorkspaceBlocks = 264;
constexpr int64_t kMostBlocks = 2147483647;

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

}  // namespace

template <class T>
PlainPlan plan_plain(const Shape& shape, Solver solver, int64_t row_heads) {
  const bool direct = solver == Solver::kCholesky;
  PlainPlan plan{};
  plan.matrix_in_workspace =
      direct && RowMemory<T>::bytes(shape.key_size, shape.value_size, true) > hopper::kMaxSharedBytes;
  const int64_t bytes = RowMemory<T>::bytes(shape.key_size, shape.value_size, direct && !plan.matrix_in_workspace);
  require(bytes <= hopper::kMaxSharedBytes, "local linear attention on CUDA: K = ", shape.key_size,
          " and V = ", shape.value_size, " need ", bytes, " bytes of shared memory for a row, and a block has ",
          hopper::kMaxSharedBytes, "; use smaller heads, or the CPU");
  plan.shared_bytes = static_cast<int>(bytes);
  plan.blocks = at_most(row_heads, plan.matrix_in_workspace ? kWorkspaceBlocks : kMostBlocks);
  plan.workspace_doubles = plan.matrix_in_workspace ? plan.blocks * RowMemory<T>::doubles(shape.key_size) : 0;
  return plan;
}

template <class T>
void forward(const Forward<T>& problem, const Sequences& sequences, double* workspace, hopper::Stream stream) {
  const int64_t row_heads = sequences.rows * problem.shape.heads;
  const PlainPlan plan = plan_plain<T>(problem.shape, problem.options.solver, row_heads);
  const int64_t step = plan.matrix_in_workspace ? RowMemory<T>::doubles(problem.shape.key_size) : 0;
  const ForwardParams<T> params{problem, sequences, workspace, step, row_heads};
  hopper::launch(
      forward_rows<T>,
      hopper::Grid{.blocks = {plan.blocks}, .threads = kThreads, .shared_bytes = plan.shared_bytes, .stream = stream},
      params);
}

template <class T>
void backward(const Backward<T>& problem, const Sequences& sequences, int64_t key_rows, double* workspace,
              hopper::Stream stream) {
  const int64_t row_heads = sequences.rows * problem.shape.heads, key_heads = key_rows * problem.shape.kv_heads;
  const PlainPlan plan = plan_plain<T>(problem.shape, problem.options.solver, row_heads);
  const int64_t step = plan.matrix_in_workspace ? RowMemory<T>::doubles(problem.shape.key_size) : 0;
  const BackwardParams<T> params{problem, sequences, workspace, step, row_heads, key_heads};
  hopper::launch(
      backward_rows<T>,
      hopper::Grid{.blocks = {plan.blocks}, .threads = kThreads, .shared_bytes = plan.shared_bytes, .stream = stream},
      params);
  const int64_t numbers = problem.shape.key_size + problem.shape.value_size + 3 * kTile;
  hopper::launch(backward_keys<T>,
                 hopper::Grid{.blocks = {at_most(key_heads, kMostBlocks)},
                              .threads = kThreads,
                              .shared_bytes = static_cast<int>(numbers * static_cast<int64_t>(sizeof(T))),
                              .stream = stream},
                 params);
}

template PlainPlan plan_plain<float>(const Shape&, Solver, int64_t);
template PlainPlan plan_plain<double>(const Shape&, Solver, int64_t);
template void forward(const Forward<float>&, const Sequences&, double*, hopper::Stream);
template void forward(const Forward<double>&, const Sequences&, double*, hopper::Stream);
template void backward(const Backward<float>&, const Sequences&, int64_t, double*, hopper::Stream);
template void backward(const Backward<double>&, const Sequences&, int64_t, double*, hopper::Stream);

}  // namespace tilewright::local_linear_attention::cuda
