// SPDX-License-Identifier: Apache-2.0
// The backward pass in the plain form: a block for each row (dq, and what the keys need of it), then a block for each key
// row (dk, dv). The formulas are those of cpu/backward_queries.h and cpu/backward_keys.h.
#pragma once

#include "ops/local_linear_attention/cuda/row_solve.cuh"

namespace tilewright::local_linear_attention::cuda {

template <class T>
struct BackwardParams {
  Backward<T> problem;  // centres: [N, HQ, K], the mean of each row, less its last visible key
  Sequences sequences;
  double* workspace;
  int64_t workspace_step;
  int64_t row_heads, key_heads;
};

template <class T>
TILEWRIGHT_DEVICE T value_gradient(const Row<T>& row, const T* value) {
  T sum = 0;
  for (int64_t d = threadIdx.x % 32; d < row.value_size; d += 32) sum += row.m.grad[d] * value[d];
  return warp_sum(sum);
}

// g = sum_j p_j gamma_j, and right = t = sum_j p_j (gamma_j - g)(k_j - kbar).
template <class T>
TILEWRIGHT_DEVICE T project_values(const Row<T>& row) {
  const RowMemory<T>& m = row.m;
  T sum = 0;
  walk(
      row, [&](int64_t j, int) { return weight(row, row.key(j)) * row.inverse * value_gradient(row, row.value(j)); },
      [&](int64_t, int n) {
        if (static_cast<int>(threadIdx.x) < n) sum += m.tile[threadIdx.x];
      });
  const T mean = block_sum(sum, m.sums);
  clear(m.right, row.key_size);
  T drift = 0;
  walk(
      row,
      [&](int64_t j, int) {
        return weight(row, row.key(j)) * row.inverse * (value_gradient(row, row.value(j)) - mean);
      },
      [&](int64_t first, int n) {
        if (static_cast<int>(threadIdx.x) < n) drift += m.tile[threadIdx.x];
        add_keys(row, first, n, m.right);
      });
  drift = block_sum(drift, m.sums);
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) m.right[d] -= drift * m.mean[d];
  __syncthreads();
  return mean;
}

// spare = sum_j p_j e_j a_j (k_j - centre); returns sum_j p_j e_j a_j.
template <class T>
TILEWRIGHT_DEVICE T multiply_factors(const Row<T>& row, const T* u, T value_mean) {
  const RowMemory<T>& m = row.m;
  const T level = T{1} + dot(row, m.mean, m.x), off = value_mean - dot(row, m.mean, u);
  clear(m.spare, row.key_size);
  T sum = 0;
  walk(
      row,
      [&](int64_t j, int) {
        const T* key = row.key(j);
        const T e = value_gradient(row, row.value(j)) - off - along(row, u, key);
        return weight(row, key) * row.inverse * e * (level - along(row, m.x, key));
      },
      [&](int64_t first, int n) {
        if (static_cast<int>(threadIdx.x) < n) sum += m.tile[threadIdx.x];
        add_keys(row, first, n, m.spare);
      });
  return block_sum(sum, m.sums);
}

template <class T>
TILEWRIGHT_DEVICE void write_record(const Backward<T>& p, const Row<T>& row, T value, T mean) {
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) p.centres[row.at * row.key_size + d] = row.m.mean[d];
  if (threadIdx.x != 0) return;
  T* record = p.records + row.at * GradRecord::kSize;
  record[GradRecord::kKeyX] = T{0};  // the keys' pass takes the mean itself
  record[GradRecord::kKeyU] = T{0};
  record[GradRecord::kValue] = value;
  record[GradRecord::kMean] = mean;
  record[GradRecord::kPeak] = row.peak;
  record[GradRecord::kOmega] = row.omega;
}

template <class T>
TILEWRIGHT_DEVICE void backward_row(const BackwardParams<T>& params, Row<T>& row) {
  const Backward<T>& p = params.problem;
  const RowMemory<T>& m = row.m;
  const bool given = p.options.solver == Solver::kGiven;
  const int64_t size = row.key_size;
  load_query(row, p.q);
  for (int64_t d = threadIdx.x; d < size; d += kThreads) m.x[d] = p.x[row.at * size + d];
  for (int64_t d = threadIdx.x; d < row.value_size; d += kThreads) m.grad[d] = p.grad[row.at * row.value_size + d];
  weigh(row);
  const T value = project_values(row);
  T* const u = m.offset;  // nothing reads the offset from here on
  clear(u, size);
  __syncthreads();
  T extra = 0, along_both = 0;
  if (!given) {
    set_ridge(row, p.ridge);
    solve(row, m.right, u, false);
    along_both = dot(row, u, m.x);
    if (p.options.absolute || !p.options.ridge_grad) extra = row.lambda * along_both;
  }
  const T mean = multiply_factors(row, u, value) + extra;
  const T scale = static_cast<T>(p.options.scale);
  for (int64_t d = threadIdx.x; d < size; d += kThreads) {
    const T sum = scale * (m.spare[d] - mean * m.mean[d] - extra * m.centre[d]);
    p.dq[row.at * size + d] = given ? sum : sum + u[d];
    if (given) p.dx[row.at * size + d] = -m.right[d];
    if (!given) p.u[row.at * size + d] = u[d];
  }
  if (!given && threadIdx.x == 0) p.dridge[row.at] = along_both * row.factor;
  write_record(p, row, value, mean);
}

template <class T>
TILEWRIGHT_DEVICE void write_nothing(const Backward<T>& p, int64_t at) {
  for (int64_t d = threadIdx.x; d < p.shape.key_size; d += kThreads) {
    p.dq[at * p.shape.key_size + d] = T{0};
    if (p.dx != nullptr) p.dx[at * p.shape.key_size + d] = T{0};
  }
  if (p.dridge != nullptr && threadIdx.x == 0) p.dridge[at] = T{0};
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) backward_rows(const __grid_constant__ BackwardParams<T> params) {
  const Backward<T>& p = params.problem;
  const bool direct = p.options.solver == Solver::kCholesky;
  double* workspace = params.workspace_step == 0 ? nullptr : params.workspace + blockIdx.x * params.workspace_step;
  for (int64_t at = blockIdx.x; at < params.row_heads; at += gridDim.x) {
    Row<T> row{p.options, RowMemory<T>(p.shape.key_size, p.shape.value_size, workspace, direct), p.shape.key_size,
               p.shape.value_size};
    if (open(row, p, params.sequences, at)) {
      backward_row(params, row);
    } else {
      write_nothing(p, at);
    }
    __syncthreads();
  }
}

// A key row of one head against all rows that see it, in their order.
template <class T>
struct KeyColumn {
  const Backward<T>& p;
  int64_t key_size, value_size, group, kv_head;
  int64_t key_at;  // index into [M, H]
  Segment segment;
  int64_t key;  // within the segment
  Range queries;
  T *dk, *dv;  // [K], [V] in shared memory
  T *score, *by_x, *by_value;  // [kTile]: scale ds, -p e, p a of each row of the tile

  TILEWRIGHT_DEVICE int64_t row_at(int64_t pair) const {
    return (segment.first_query + queries.begin + pair / group) * p.shape.heads + kv_head * group + pair % group;
  }
};

// By a warp: the factors of one pair of row and key.
template <class T>
TILEWRIGHT_DEVICE void weigh_pair(const KeyColumn<T>& c, int64_t pair, int slot) {
  const Backward<T>& p = c.p;
  const int64_t at = c.row_at(pair), size = c.key_size;
  const Range seen = visible_keys(p.options, c.segment, c.queries.begin + pair / c.group);
  const T* key = p.k + c.key_at * size;
  const T* centre = p.k + ((c.segment.first_key + seen.end - 1) * p.shape.kv_heads + c.kv_head) * size;
  T score = 0, along_x = 0, along_u = 0, gamma = 0;
  for (int64_t d = threadIdx.x % 32; d < size; d += 32) {
    const T z = key[d] - centre[d], from_mean = z - p.centres[at * size + d];
    score += p.q[at * size + d] * static_cast<T>(p.options.scale) * z;
    along_x += p.x[at * size + d] * from_mean;
    if (p.u != nullptr) along_u += p.u[at * size + d] * from_mean;
  }
  for (int64_t d = threadIdx.x % 32; d < c.value_size; d += 32) {
    gamma += p.grad[at * c.value_size + d] * p.v[c.key_at * c.value_size + d];
  }
  const T* record = p.records + at * GradRecord::kSize;
  const T omega = record[GradRecord::kOmega];
  const T weight = exponential(warp_sum(score) - record[GradRecord::kPeak]) * (omega == T{0} ? T{0} : T{1} / omega);
  const T a = T{1} - warp_sum(along_x), e = warp_sum(gamma) - record[GradRecord::kValue] - warp_sum(along_u);
  if (threadIdx.x % 32 != 0) return;
  c.score[slot] = static_cast<T>(p.options.scale) * weight * (e * a - record[GradRecord::kMean]);
  c.by_x[slot] = -weight * e;
  c.by_value[slot] = weight * a;
}

template <class T>
TILEWRIGHT_DEVICE void add_pairs(const KeyColumn<T>& c, int64_t first, int n) {
  const Backward<T>& p = c.p;
  for (int64_t d = threadIdx.x; d < c.key_size; d += kThreads) {
    T sum = c.dk[d];
    for (int i = 0; i < n; ++i) {
      const int64_t at = c.row_at(first + i) * c.key_size + d;
      sum += c.score[i] * p.q[at] + c.by_x[i] * p.x[at];
      if (p.u != nullptr) sum -= c.by_value[i] * p.u[at];
    }
    c.dk[d] = sum;
  }
  for (int64_t d = threadIdx.x; d < c.value_size; d += kThreads) {
    T sum = c.dv[d];
    for (int i = 0; i < n; ++i) sum += c.by_value[i] * p.grad[c.row_at(first + i) * c.value_size + d];
    c.dv[d] = sum;
  }
}

template <class T>
TILEWRIGHT_DEVICE void backward_key(KeyColumn<T>& c) {
  clear(c.dk, c.key_size);
  clear(c.dv, c.value_size);
  const int64_t pairs = c.queries.size() * c.group;
  for (int64_t first = 0; first < pairs; first += kTile) {
    const int n = static_cast<int>(pairs - first < kTile ? pairs - first : kTile);
    for (int i = static_cast<int>(threadIdx.x) / 32; i < n; i += kWarps) weigh_pair(c, first + i, i);
    __syncthreads();
    add_pairs(c, first, n);
    __syncthreads();
  }
  for (int64_t d = threadIdx.x; d < c.key_size; d += kThreads) c.p.dk[c.key_at * c.key_size + d] = c.dk[d];
  for (int64_t d = threadIdx.x; d < c.value_size; d += kThreads) c.p.dv[c.key_at * c.value_size + d] = c.dv[d];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) backward_keys(const __grid_constant__ BackwardParams<T> params) {
  const Backward<T>& p = params.problem;
  T* at = reinterpret_cast<T*>(hopper::shared_memory());
  for (int64_t key_at = blockIdx.x; key_at < params.key_heads; key_at += gridDim.x) {
    const int64_t key_row = key_at / p.shape.kv_heads;
    KeyColumn<T> c{
        p, p.shape.key_size, p.shape.value_size, p.shape.heads / p.shape.kv_heads, key_at % p.shape.kv_heads, key_at};
    c.dk = at;
    c.dv = c.dk + c.key_size;
    c.score = c.dv + c.value_size;
    c.by_x = c.score + kTile;
    c.by_value = c.by_x + kTile;
    const int64_t index = sequence_of_key(params.sequences, key_row);
    c.queries = {0, 0};
    if (index >= 0) {
      c.segment = segment(params.sequences, index);
      c.key = key_row - c.segment.first_key;
      if (c.key < c.segment.keys) c.queries = seeing_queries(p.options, c.segment, c.key);
    }
    backward_key(c);
    __syncthreads();
  }
}

}  // namespace tilewright::local_linear_attention::cuda
