// SPDX-License-Identifier: Apache-2.0
// One row of the forward pass in the plain form: weights, solve, output.
#pragma once

#include "ops/local_linear_attention/cuda/row_solve.cuh"

namespace tilewright::local_linear_attention::cuda {

template <class T>
struct ForwardParams {
  Forward<T> problem;
  Sequences sequences;
  double* workspace;
  int64_t workspace_step;  // doubles a block; 0 where shared memory holds the matrix
  int64_t row_heads;
};

// right = kbar - q; zero for a row without keys.
template <class T>
TILEWRIGHT_DEVICE void right_side(const Row<T>& row) {
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) {
    row.m.right[d] = row.count == 0 ? T{0} : row.m.mean[d] - row.m.offset[d];
  }
  __syncthreads();
}

// out = sum_j p_j (1 - (k_j - kbar).x) v_j, over the sum of its weights, which is 1 but for rounding: what is left is then
// relative to the spread of the values. A sum far from 1 belongs to a row that rounding has spoilt, or to one without keys.
template <class T>
TILEWRIGHT_DEVICE T gather_values(const Row<T>& row) {
  const RowMemory<T>& m = row.m;
  const T level = T{1} + dot(row, m.mean, m.x);
  clear(m.out, row.value_size);
  T total = 0;
  walk(
      row,
      [&](int64_t j, int) {
        const T* key = row.key(j);
        return weight(row, key) * row.inverse * (level - along(row, m.x, key));
      },
      [&](int64_t first, int n) {
        if (static_cast<int>(threadIdx.x) < n) total += m.tile[threadIdx.x];
        for (int64_t d = threadIdx.x; d < row.value_size; d += kThreads) {
          T sum = m.out[d];
          for (int j = 0; j < n; ++j) sum += m.tile[j] * row.value(first + j)[d];
          m.out[d] = sum;
        }
      });
  total = block_sum(total, m.sums);
  return total > T{0.5} ? T{1} / total : T{1};
}

template <class T>
TILEWRIGHT_DEVICE void write_solution(const Forward<T>& p, const Row<T>& row, const Solved& solved) {
  const T leverage = dot(row, row.m.right, row.m.x);
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) p.x[row.at * row.key_size + d] = row.m.x[d];
  if (threadIdx.x != 0) return;
  T* record = p.rows + row.at * RowRecord::kSize;
  record[RowRecord::kPeak] = row.peak;
  record[RowRecord::kOmega] = row.omega;
  record[RowRecord::kLeverage] = leverage;
  record[RowRecord::kResidual] = static_cast<T>(solved.residual);
  p.iterations[row.at] = solved.iterations;
}

template <class T>
TILEWRIGHT_DEVICE void write_nothing(const Forward<T>& p, int64_t at) {
  for (int64_t d = threadIdx.x; d < p.shape.value_size; d += kThreads) p.o[at * p.shape.value_size + d] = T{0};
  if (p.options.solver == Solver::kGiven) return;
  for (int64_t d = threadIdx.x; d < p.shape.key_size; d += kThreads) p.x[at * p.shape.key_size + d] = T{0};
  if (threadIdx.x < RowRecord::kSize) p.rows[at * RowRecord::kSize + threadIdx.x] = T{0};
  if (threadIdx.x == 0) p.iterations[at] = 0;
}

template <class T>
TILEWRIGHT_DEVICE void forward_row(const ForwardParams<T>& params, Row<T>& row) {
  const Forward<T>& p = params.problem;
  load_query(row, p.q);
  weigh(row);
  right_side(row);
  const bool given = p.options.solver == Solver::kGiven;
  if (p.start != nullptr) {
    for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) row.m.x[d] = p.start[row.at * row.key_size + d];
    __syncthreads();
  }
  Solved solved{0.0, 0};
  if (!given) {
    set_ridge(row, p.ridge);
    solved = solve(row, row.m.right, row.m.x, p.start != nullptr);
  }
  const T factor = gather_values(row);
  for (int64_t d = threadIdx.x; d < row.value_size; d += kThreads) {
    p.o[row.at * row.value_size + d] = row.m.out[d] * factor;
  }
  if (!given) write_solution(p, row, solved);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) forward_rows(const __grid_constant__ ForwardParams<T> params) {
  const Forward<T>& p = params.problem;
  const bool direct = p.options.solver == Solver::kCholesky;
  double* workspace = params.workspace_step == 0 ? nullptr : params.workspace + blockIdx.x * params.workspace_step;
  for (int64_t at = blockIdx.x; at < params.row_heads; at += gridDim.x) {
    Row<T> row{p.options, RowMemory<T>(p.shape.key_size, p.shape.value_size, workspace, direct), p.shape.key_size,
               p.shape.value_size};
    if (open(row, p, params.sequences, at)) {
      forward_row(params, row);
    } else {
      write_nothing(p, at);
    }
    __syncthreads();
  }
}

}  // namespace tilewright::local_linear_attention::cuda
