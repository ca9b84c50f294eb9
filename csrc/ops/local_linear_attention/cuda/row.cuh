// SPDX-License-Identifier: Apache-2.0
// The plain form: one block of threads takes one row (a query of one head) and walks over the keys that it sees, tile by
// tile of 128. In a tile a warp forms the products of one key after the other, then the threads share the elements of the
// sums. Nothing is kept a key, so a pass forms the scores again.
//
// Keys are taken less the last visible one (the centre): differences then lose no more than the spread of the keys is worth.
#pragma once

#include "ops/local_linear_attention/cuda/sequences.cuh"

namespace tilewright::local_linear_attention::cuda {

inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kTile = 128;  // keys: one a thread where a tile's numbers are summed

TILEWRIGHT_DEVICE float exponential(float x) { return expf(x); }
TILEWRIGHT_DEVICE double exponential(double x) { return exp(x); }
TILEWRIGHT_DEVICE float square_root(float x) { return sqrtf(x); }
TILEWRIGHT_DEVICE double square_root(double x) { return sqrt(x); }

template <class T>
TILEWRIGHT_DEVICE bool finite(T x) {
  return x - x == T{0};
}
template <class T>
TILEWRIGHT_DEVICE T not_a_number() {
  return static_cast<T>(hopper::bits_float(0x7fc00000u));
}
template <class T>
TILEWRIGHT_DEVICE T lowest() {
  return static_cast<T>(hopper::bits_float(0xff800000u));
}

template <class T>
TILEWRIGHT_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Of all threads, in an order that does not depend on when they come. `shared` has kWarps numbers.
template <class T>
TILEWRIGHT_DEVICE T block_sum(T x, T* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  return sum;
}
template <class T>
TILEWRIGHT_DEVICE T block_max(T x, T* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  T most = shared[0];
  for (int w = 1; w < kWarps; ++w) most = shared[w] > most ? shared[w] : most;
  return most;
}

// Shared memory of a block, in this order.
template <class T>
struct RowMemory {
  static constexpr int kVectors = 11;
  double* matrix;  // [K (K + 1) / 2] for Cholesky, then [K] unknowns; or in the workspace
  T *scaled, *offset, *centre;  // [K]: scale q; q less the centre; the last visible key
  T *mean, *right, *x;  // [K]: kbar less the centre; right-hand side; solution
  T *left, *direction, *image, *diagonal, *spare;  // [K], of the solver; spare: of the backward pass
  T* grad;  // [V], do in the backward pass
  T* out;  // [V]
  T *tile, *other;  // [kTile]
  T* sums;  // [kWarps]

  static TILEWRIGHT_BOTH int64_t doubles(int64_t key_size) { return key_size * (key_size + 1) / 2 + key_size; }
  static TILEWRIGHT_BOTH int64_t bytes(int64_t key_size, int64_t value_size, bool matrix) {
    const int64_t numbers = kVectors * key_size + 2 * value_size + 2 * kTile + kWarps;
    return (matrix ? doubles(key_size) * 8 : 0) + numbers * static_cast<int64_t>(sizeof(T));
  }

  TILEWRIGHT_DEVICE RowMemory(int64_t key_size, int64_t value_size, double* workspace, bool has_matrix) {
    char* at = hopper::shared_memory();
    matrix = workspace;
    if (has_matrix && workspace == nullptr) {
      matrix = reinterpret_cast<double*>(at);
      at += doubles(key_size) * 8;
    }
    T* next = reinterpret_cast<T*>(at);
    T** vectors[kVectors] = {&scaled, &offset,    &centre, &mean,     &right, &x,
                             &left,   &direction, &image,  &diagonal, &spare};
    for (T** vector : vectors) {
      *vector = next;
      next += key_size;
    }
    grad = next;
    out = grad + value_size;
    tile = out + value_size;
    other = tile + kTile;
    sums = other + kTile;
  }
};

template <class T>
struct Row {
  const Options& options;
  RowMemory<T> m;
  int64_t key_size, value_size;
  int64_t at;  // row and head: index into [N, HQ]
  const T *keys, *values;  // of the first visible key
  int64_t key_step, value_step;  // from one key to the next
  int64_t count;  // visible keys
  T peak, omega, inverse, lambda, factor;

  TILEWRIGHT_DEVICE const T* key(int64_t j) const { return keys + j * key_step; }
  TILEWRIGHT_DEVICE const T* value(int64_t j) const { return values + j * value_step; }
};

template <class T>
TILEWRIGHT_DEVICE T dot(const Row<T>& row, const T* a, const T* b) {
  T sum = 0;
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) sum += a[d] * b[d];
  return block_sum(sum, row.m.sums);
}

// The sum over d of from[d] (key[d] - centre[d]); all lanes of a warp get it.
template <class T>
TILEWRIGHT_DEVICE T along(const Row<T>& row, const T* from, const T* key) {
  T sum = 0;
  for (int64_t d = threadIdx.x % 32; d < row.key_size; d += 32) sum += from[d] * (key[d] - row.m.centre[d]);
  return warp_sum(sum);
}

template <class T>
TILEWRIGHT_DEVICE T weight(const Row<T>& row, const T* key) {
  return exponential(along(row, row.m.scaled, key) - row.peak);
}

// For each tile: number(j) of every key by a warp, into m.tile; then element(j0, n) by all threads.
template <class T, class Number, class Elements>
TILEWRIGHT_DEVICE void walk(const Row<T>& row, const Number& number, const Elements& elements) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t first = 0; first < row.count; first += kTile) {
    const int n = static_cast<int>(row.count - first < kTile ? row.count - first : kTile);
    for (int j = warp; j < n; j += kWarps) {
      const T value = number(first + j, j);
      if (lane == 0) row.m.tile[j] = value;
    }
    __syncthreads();
    elements(first, n);
    __syncthreads();
  }
}

// to[d] += sum_j tile[j] (key_j[d] - centre[d]).
template <class T>
TILEWRIGHT_DEVICE void add_keys(const Row<T>& row, int64_t first, int n, T* to) {
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) {
    T sum = to[d];
    for (int j = 0; j < n; ++j) sum += row.m.tile[j] * (row.key(first + j)[d] - row.m.centre[d]);
    to[d] = sum;
  }
}

template <class T>
TILEWRIGHT_DEVICE void clear(T* to, int64_t size) {
  for (int64_t d = threadIdx.x; d < size; d += kThreads) to[d] = T{0};
}

template <class T>
TILEWRIGHT_DEVICE void load_query(Row<T>& row, const T* q) {
  const T* last = row.count > 0 ? row.key(row.count - 1) : nullptr;
  const T scale = static_cast<T>(row.options.scale);
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) {
    const T value = q[row.at * row.key_size + d], centre = last == nullptr ? T{0} : last[d];
    row.m.scaled[d] = scale * value;
    row.m.offset[d] = value - centre;
    row.m.centre[d] = centre;
  }
  __syncthreads();
}

// peak, omega and the mean: two walks, so that weights have their final size at once.
template <class T>
TILEWRIGHT_DEVICE void weigh(Row<T>& row) {
  T peak = lowest<T>();
  for (int64_t j = threadIdx.x / 32; j < row.count; j += kWarps) {
    const T score = along(row, row.m.scaled, row.key(j));
    peak = score > peak ? score : peak;
  }
  peak = block_max(peak, row.m.sums);
  row.peak = peak == lowest<T>() ? T{0} : peak;
  clear(row.m.mean, row.key_size);
  T omega = 0;
  walk(
      row, [&](int64_t j, int) { return weight(row, row.key(j)); },
      [&](int64_t first, int n) {
        if (static_cast<int>(threadIdx.x) < n) omega += row.m.tile[threadIdx.x];
        add_keys(row, first, n, row.m.mean);
      });
  row.omega = block_sum(omega, row.m.sums);
  row.inverse = row.omega == T{0} ? T{0} : T{1} / row.omega;
  for (int64_t d = threadIdx.x; d < row.key_size; d += kThreads) row.m.mean[d] *= row.inverse;
  __syncthreads();
}

// What lambda counts for beside a covariance, as in the CPU kernel. What cannot be solved is NaN: a negative lambda, and
// zero for conjugate gradients.
template <class T>
TILEWRIGHT_DEVICE void set_ridge(Row<T>& row, const T* ridge) {
  constexpr T kMost = static_cast<T>(1e30);
  row.factor = T{1};
  row.lambda = T{1};
  if (row.count == 0) return;
  if (row.options.absolute) {
    const T shift = row.peak + dot(row, row.m.scaled, row.m.centre);
    const T factor = exponential(-shift) * row.inverse;
    row.factor = factor > kMost ? kMost : factor;
  }
  const T given = ridge[row.at], value = given * row.factor;
  row.lambda = value > kMost ? kMost : value;
  const bool solvable = given > T{0} || (given == T{0} && row.options.solver == Solver::kCholesky);
  if (!solvable) row.lambda = not_a_number<T>();
}

// The row that an index into [N, HQ] names; false where it belongs to no sequence.
template <class T, class Problem>
TILEWRIGHT_DEVICE bool open(Row<T>& row, const Problem& p, const Sequences& sequences, int64_t at) {
  const int64_t query_row = at / p.shape.heads, head = at % p.shape.heads;
  const int64_t kv_head = head / (p.shape.heads / p.shape.kv_heads);
  const int64_t index = sequence_of_row(sequences, query_row);
  row.at = at;
  row.count = 0;
  if (index < 0) return false;
  const Segment s = segment(sequences, index);
  const Range seen = visible_keys(p.options, s, query_row - s.first_query);
  row.count = seen.size();
  const int64_t first = (s.first_key + seen.begin) * p.shape.kv_heads + kv_head;
  row.keys = p.k + first * p.shape.key_size;
  row.values = p.v + first * p.shape.value_size;
  row.key_step = p.shape.kv_heads * p.shape.key_size;
  row.value_step = p.shape.kv_heads * p.shape.value_size;
  return true;
}

}  // namespace tilewright::local_linear_attention::cuda
