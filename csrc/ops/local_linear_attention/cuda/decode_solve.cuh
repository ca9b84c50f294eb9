// SPDX-License-Identifier: Apache-2.0
// The steps between walks over the cache: a warp for each row, the same in all blocks of a cluster.
#pragma once

#include "ops/local_linear_attention/cuda/decode.cuh"

namespace tilewright::local_linear_attention::cuda {

// A row's vectors, for the warp that has it.
template <int Rows>
struct RowVectors {
  using M = DecodeMemory<Rows>;
  const M& m;
  int row, size, lane;
  float *direction, *x, *left, *mean, *right;
  const float* sums;

  template <class T>
  TILEWRIGHT_DEVICE RowVectors(const Decoder<T, Rows>& c, int its_row)
      : m(c.m), row(its_row), size(c.key_size), lane(static_cast<int>(threadIdx.x) % 32) {
    direction = m.direction + row * size;
    x = m.x + row * size;
    left = m.left + row * size;
    mean = m.mean + row * size;
    right = m.right + row * size;
    sums = m.sums + row * (c.p.width + 2);
  }
  TILEWRIGHT_DEVICE float dot(const float* a, const float* b) const {
    float sum = 0.0f;
    for (int d = lane; d < size; d += 32) sum = fmaf(a[d], b[d], sum);
    return sum_of_warp(sum);
  }
  TILEWRIGHT_DEVICE float& number(int which) const { return m.number(row, which); }
  // An element of (Cov + lambda I) from, after apply_to_cache.
  TILEWRIGHT_DEVICE float image(int d, const float* from) const {
    return fmaf(sums[d] - sums[size] * mean[d], number(M::kInverse), number(M::kLambda) * from[d]);
  }
};

// After weigh_cache: kbar, the right-hand side, lambda.
template <class T, int Rows>
TILEWRIGHT_DEVICE void open_row(const Decoder<T, Rows>& c, int row, int64_t at) {
  using M = DecodeMemory<Rows>;
  const RowVectors<Rows> v(c, row);
  const float omega = v.sums[v.size], peak = v.sums[v.size + 1], inverse = omega == 0.0f ? 0.0f : 1.0f / omega;
  for (int d = v.lane; d < v.size; d += 32) {
    v.mean[d] = v.sums[d] * inverse;
    v.right[d] = omega == 0.0f ? 0.0f : v.mean[d] - v.direction[d];
    v.x[d] = c.p.start == nullptr ? 0.0f : c.p.start[at * v.size + d];
    v.left[d] = v.right[d];
  }
  __syncwarp();
  const float square = v.dot(v.right, v.right), rtol = static_cast<float>(c.p.options.rtol);
  float lambda = 1.0f;
  if (omega != 0.0f) {
    const float factor = c.p.options.absolute ? fminf(exp2f(-peak) * inverse, 1e30f) : 1.0f, given = c.p.ridge[at];
    lambda = given > 0.0f ? fminf(given * factor, 1e30f) : hopper::bits_float(0x7fc00000u);
  }
  __syncwarp();
  if (v.lane != 0) return;
  v.number(M::kPeak) = peak;
  v.number(M::kOmega) = omega;
  v.number(M::kInverse) = inverse;
  v.number(M::kLambda) = lambda;
  v.number(M::kShift) = 0.0f;
  v.number(M::kSquare) = square;
  v.number(M::kLimit) = rtol * rtol * square;
  v.number(M::kCount) = 0.0f;
  const bool spoilt = square - square != 0.0f || lambda != lambda;
  v.number(M::kSpoilt) = spoilt ? 1.0f : 0.0f;
  v.number(M::kActive) = !spoilt && square > v.number(M::kLimit) ? 1.0f : 0.0f;
}

// The shift of the next walk: kbar.from.
template <int Rows>
TILEWRIGHT_DEVICE void set_shift(const RowVectors<Rows>& v, const float* from) {
  const float shift = v.dot(v.mean, from);
  if (v.lane == 0) v.number(DecodeMemory<Rows>::kShift) = shift;
}

// After apply_to_cache(x): x becomes its best multiple, the step along it that an iteration would take.
template <class T, int Rows>
TILEWRIGHT_DEVICE void scale_start(const Decoder<T, Rows>& c, int row) {
  const RowVectors<Rows> v(c, row);
  float curvature = 0.0f;
  for (int d = v.lane; d < v.size; d += 32) curvature = fmaf(v.x[d], v.image(d, v.x), curvature);
  float step = v.dot(v.x, v.right) / sum_of_warp(curvature);
  if (step - step != 0.0f) step = 0.0f;
  for (int d = v.lane; d < v.size; d += 32) {
    v.left[d] = step == 0.0f ? v.right[d] : v.right[d] - step * v.image(d, v.x);
    v.x[d] = step == 0.0f ? 0.0f : step * v.x[d];
  }
  __syncwarp();
}

// The first direction, once x and the residual stand.
template <class T, int Rows>
TILEWRIGHT_DEVICE void start_row(const Decoder<T, Rows>& c, int row) {
  using M = DecodeMemory<Rows>;
  const RowVectors<Rows> v(c, row);
  const float square = v.dot(v.left, v.left);
  for (int d = v.lane; d < v.size; d += 32) v.direction[d] = v.left[d];
  __syncwarp();
  set_shift(v, v.direction);
  if (v.lane != 0) return;
  v.number(M::kActive) = v.number(M::kSpoilt) == 0.0f && square > v.number(M::kLimit) ? 1.0f : 0.0f;
  v.number(M::kSquare) = square;
}

// After apply_to_cache(direction).
template <class T, int Rows>
TILEWRIGHT_DEVICE void step_row(const Decoder<T, Rows>& c, int row) {
  using M = DecodeMemory<Rows>;
  const RowVectors<Rows> v(c, row);
  if (v.number(M::kActive) == 0.0f) return;
  float curvature = 0.0f;
  for (int d = v.lane; d < v.size; d += 32) curvature = fmaf(v.direction[d], v.image(d, v.direction), curvature);
  curvature = sum_of_warp(curvature);
  const float before = v.number(M::kSquare), step = before / curvature;
  const bool gains = curvature > 0.0f;  // rounding or NaN: nothing to be gained along this direction
  float square = 0.0f;
  for (int d = v.lane; d < v.size && gains; d += 32) {
    v.x[d] += step * v.direction[d];
    v.left[d] -= step * v.image(d, v.direction);
    square = fmaf(v.left[d], v.left[d], square);
  }
  square = sum_of_warp(square);
  const bool goes_on = gains && square > v.number(M::kLimit) &&
                       v.number(M::kCount) + 1.0f < static_cast<float>(c.p.options.max_iterations);
  for (int d = v.lane; d < v.size && goes_on; d += 32) v.direction[d] = v.left[d] + square / before * v.direction[d];
  __syncwarp();
  set_shift(v, v.direction);
  if (v.lane != 0) return;
  v.number(M::kActive) = goes_on ? 1.0f : 0.0f;
  if (!gains) return;
  v.number(M::kSquare) = square;
  v.number(M::kCount) += 1.0f;
}

// Before read_cache: x, or NaN where it cannot be had, and what is said of the row. One block of the cluster writes.
template <class T, int Rows>
TILEWRIGHT_DEVICE void close_row(const Decoder<T, Rows>& c, int row, int64_t at) {
  using M = DecodeMemory<Rows>;
  const RowVectors<Rows> v(c, row);
  const bool spoilt = v.number(M::kSpoilt) != 0.0f;
  for (int d = v.lane; d < v.size; d += 32) {
    if (spoilt) v.x[d] = hopper::bits_float(0x7fc00000u);
    if (c.rank == 0) c.p.x[at * v.size + d] = v.x[d];
  }
  __syncwarp();
  set_shift(v, v.x);
  const float leverage = v.dot(v.right, v.x), size = v.dot(v.right, v.right);
  if (v.lane != 0 || c.rank != 0) return;
  float* record = c.p.rows + at * RowRecord::kSize;
  record[RowRecord::kPeak] = v.number(M::kPeak) / 1.4426950408889634f;
  record[RowRecord::kOmega] = v.number(M::kOmega);
  record[RowRecord::kLeverage] = leverage;
  record[RowRecord::kResidual] = size == 0.0f ? 0.0f : sqrtf(v.number(M::kSquare) / size);
  c.p.iterations[at] = static_cast<int32_t>(v.number(M::kCount));
}

// Which rows and keys the block has; q goes to m.direction.
template <class T, int Rows>
TILEWRIGHT_DEVICE Decoder<T, Rows> make_decoder(const DecodeParams<T>& p) {
  const int key_size = static_cast<int>(p.shape.key_size), thread = static_cast<int>(threadIdx.x);
  Decoder<T, Rows> c{p, DecodeMemory<Rows>(key_size, p.width), key_size, static_cast<int>(p.shape.value_size)};
  c.rank = static_cast<int>(blockIdx.x % kDecodeCluster);
  c.lane = thread % p.lanes;
  c.group = thread / p.lanes;
  c.groups = kDecodeThreads / p.lanes;
  c.parity = 0;
  const int64_t cluster = blockIdx.x / kDecodeCluster, chunk = cluster % p.chunks;
  const int64_t kv_head = cluster / p.chunks % p.shape.kv_heads, index = cluster / p.chunks / p.shape.kv_heads;
  const int64_t shared = p.shape.heads / p.shape.kv_heads;
  const Segment s = segment(p.sequences, index);
  // Vectors of rows that do not exist are zero.
  for (int i = thread; i < DecodeMemory<Rows>::floats(key_size, p.width); i += kDecodeThreads) {
    reinterpret_cast<float*>(c.m.seen)[i] = 0.0f;
  }
  __syncthreads();
  if (thread < Rows) {
    const int64_t row = chunk * Rows + thread, query = row / shared;
    const bool exists = query < s.queries;
    c.m.at[thread] = exists ? (s.first_query + query) * p.shape.heads + kv_head * shared + row % shared : -1;
    c.m.seen[thread] = exists ? visible_keys(p.options, s, query) : Range{0, 0};
  }
  __syncthreads();
  int64_t first = s.keys, last = 0;
  for (int r = 0; r < Rows; ++r) {
    const Range seen = c.m.seen[r];
    if (seen.size() == 0) continue;
    first = first < seen.begin ? first : seen.begin;
    last = last > seen.end ? last : seen.end;
  }
  const int64_t count = last > first ? last - first : 0, share = (count + kDecodeCluster - 1) / kDecodeCluster;
  c.begin = first + clamp(share * c.rank, 0, count);
  c.end = first + clamp(share * (c.rank + 1), 0, count);
  c.keys = p.k + (s.first_key * p.shape.kv_heads + kv_head) * p.shape.key_size;
  c.values = p.v + (s.first_key * p.shape.kv_heads + kv_head) * p.shape.value_size;
  c.key_step = p.shape.kv_heads * p.shape.key_size;
  c.value_step = p.shape.kv_heads * p.shape.value_size;
  c.partials = p.partials + cluster * 2 * kDecodeCluster * Rows * (p.width + 2);
  for (int i = thread; i < Rows * key_size; i += kDecodeThreads) {
    const int64_t at = c.m.at[i / key_size];
    c.m.direction[i] = at < 0 ? 0.0f : hopper::to_float(p.q[at * key_size + i % key_size]);
  }
  __syncthreads();
  return c;
}

template <class T, int Rows>
TILEWRIGHT_DEVICE bool any_active(const Decoder<T, Rows>& c) {
  bool any = false;
  for (int r = 0; r < Rows; ++r) any = any || c.m.number(r, DecodeMemory<Rows>::kActive) != 0.0f;
  return any;
}

template <class T, int Rows>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode(const __grid_constant__ DecodeParams<T> p) {
  static_assert(Rows <= kDecodeWarps);
  Decoder<T, Rows> c = make_decoder<T, Rows>(p);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t at = warp < Rows ? c.m.at[warp] : -1;
  const bool has_row = at >= 0;
  weigh_cache(c);
  if (has_row) open_row(c, warp, at);
  if (p.start != nullptr) {
    if (has_row) set_shift(RowVectors<Rows>(c, warp), RowVectors<Rows>(c, warp).x);
    __syncthreads();
    apply_to_cache(c, c.m.x);
    if (has_row) scale_start(c, warp);
  }
  if (has_row) start_row(c, warp);
  __syncthreads();
  while (any_active(c)) {
    apply_to_cache(c, c.m.direction);
    if (has_row) step_row(c, warp);
    __syncthreads();
  }
  if (has_row) close_row(c, warp, at);
  __syncthreads();
  read_cache(c);
  if (c.rank != 0 || !has_row) return;
  const float* sums = c.m.sums + warp * (p.width + 2);
  const float total = sums[c.value_size], factor = total > 0.5f ? 1.0f / total : 1.0f;
  for (int d = static_cast<int>(threadIdx.x) % 32; d < c.value_size; d += 32) {
    p.o[at * c.value_size + d] = hopper::from_float<T>(sums[d] * factor);
  }
}

}  // namespace tilewright::local_linear_attention::cuda
