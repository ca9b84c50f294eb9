// SPDX-License-Identifier: Apache-2.0
// Conjugate gradients of 128 rows in the tensor-core form. The notation is that of README.md.
//
// Precision. q, k and v are taken as they are; weights, the factors w (k - kbar).p and the direction p are rounded to 16
// bits for a product. What is rounded is then what counts: x moves along the rounded direction, kbar is the mean under the
// rounded weights, and the sum of the rounded factors is what is taken off, so that rounding is relative to the spread of
// the keys. Step and conjugation use p.Ap and r.Ap as computed, which holds for any direction. A residual below
// kResolution of the right-hand side is beyond what such products resolve.
#pragma once

#include "ops/local_linear_attention/cuda/flash.cuh"

namespace tilewright::local_linear_attention::cuda {

template <class T>
inline constexpr float kResolution = std::is_same_v<T, hopper::bf16> ? 0x1p-10f : 0x1p-13f;

template <class T>
TILEWRIGHT_DEVICE float tolerance(const Options& options) {
  return fmaxf(static_cast<float>(options.rtol), kResolution<T>);
}

// A row's numbers, for the two rows of a thread.
struct RowNumbers {
  float scale;  // of the scores, in units of the power of 2
  float peak[2], inverse[2];  // in the same units; 1 / omega, 0 for a row without keys
  bool active[2];
};

// s becomes the weights.
template <class T, int D, int Count>
TILEWRIGHT_DEVICE void weigh_tile(const Consumer<T, D>& c, const RowNumbers& n, int tile, float (&s)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) s[i] = hopper::exp2_flushed(fmaf(s[i], n.scale, -n.peak[i / 2 % 2]));
  if (c.whole(tile)) return;
  const Seen seen = c.seen();
#pragma unroll
  for (int i = 0; i < Count; ++i) s[i] = c.sees(seen, i, tile) ? s[i] : 0.0f;
}

template <class T, int D>
TILEWRIGHT_DEVICE float pair_dot(uint32_t a, uint32_t b) {
  float a0, a1, b0, b1;
  hopper::unpack_pair<T>(a, a0, a1);
  hopper::unpack_pair<T>(b, b0, b1);
  return a0 * b0 + a1 * b1;
}

// kbar, in y, kept in 16 bits.
template <class T, int D>
TILEWRIGHT_DEVICE void keep_mean(const Consumer<T, D>& c, const float (&y)[D / 2]) {
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) c.mean(i / 2) = hopper::pack_pair<T>(y[i], y[i + 1]);
}

// y is the right-hand side and the first residual; its unit is the first direction.
template <class T, int D>
TILEWRIGHT_DEVICE void start_solve(Consumer<T, D>& c, RowNumbers& n, const float (&y)[D / 2], const Options& options,
                                   bool given) {
  using S = FlashShape<T, D>;
  float square[2] = {0.0f, 0.0f}, unit[2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) {
    c.residual(i) = y[i];
    square[i / 2 % 2] += y[i] * y[i];
  }
  const float rtol = tolerance<T>(options);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    square[h] = quad_sum(square[h]);
    const float limit = rtol * rtol * square[h];
    c.set_number(RowNumber::kSquare, h, square[h]);
    c.set_number(RowNumber::kLimit, h, limit);
    c.set_number(RowNumber::kCount, h, 0.0f);
    // Written so that NaN is not active.
    n.active[h] = !given && c.valid(h) && square[h] > limit && square[h] - square[h] == 0.0f;
    if (n.active[h]) n.active[h] = c.number(RowNumber::kLambda, h) > 0.0f;
    unit[h] = n.active[h] ? rsqrtf(square[h]) : 0.0f;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    c.pair(S::kLeft, i) = hopper::pack_pair<T>(y[i] * unit[i / 2 % 2], y[i + 1] * unit[i / 2 % 2]);
  }
}

// y = sum_j w_j (k_j - kbar).p k_j for the directions in the left tile; drift gets the sum of the factors.
template <class T, int D>
TILEWRIGHT_DEVICE void apply_covariance(Consumer<T, D>& c, const RowNumbers& n, bool active, float (&y)[D / 2],
                                        float (&drift)[2]) {
  using S = FlashShape<T, D>;
  constexpr int kCount = S::kKeys / 2;
  float s[kCount], along[kCount], shift[2] = {0.0f, 0.0f};
  uint32_t factors[S::kKeys / 16][4];
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    shift[i / 2 % 2] += pair_dot<T, D>(c.mean(i / 2), c.pair(S::kLeft, i));
    y[i] = y[i + 1] = 0.0f;
  }
  for (int h = 0; h < 2; ++h) {
    shift[h] = quad_sum(shift[h]);
    drift[h] = 0.0f;
  }
  c.forget_addresses();
  walk_keys(
      c, active, false,
      [&](const char* keys) {
        project<T, D>(c, S::kQuery, keys, s);
        project<T, D>(c, S::kLeft, keys, along);
      },
      [&](int tile) {
        hopper::keep(s);
        hopper::keep(along);
        hopper::keep(y);
        weigh_tile(c, n, tile, s);
#pragma unroll
        for (int i = 0; i < kCount; ++i) s[i] *= along[i] - shift[i / 2 % 2];
        pack_factors<T>(s, factors, drift);
      },
      [&](const char* keys) { collect<T, D>(factors, keys, y); });
  hopper::keep(y);
  for (int h = 0; h < 2; ++h) drift[h] = quad_sum(drift[h]);
}

template <class T, int D>
TILEWRIGHT_DEVICE float* solution_row(const Consumer<T, D>& c, float* solutions, const Shape& shape, int h) {
  return solutions + c.at(h, shape) * shape.key_size;
}

// x += step p for the rows that are active. Not unrolled: the sums that wait beside it leave few registers for loads.
template <class T, int D>
TILEWRIGHT_DEVICE void move_solution(const Consumer<T, D>& c, const RowNumbers& n, const float (&step)[2],
                                     float* solutions, const Shape& shape) {
  using S = FlashShape<T, D>;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!n.active[h]) continue;
    float* const x = solution_row(c, solutions, shape, h);
#pragma unroll 2
    for (int i = 2 * h; i < D / 2; i += 4) {
      if (c.col(i) >= shape.key_size) break;
      float low, high;
      hopper::unpack_pair<T>(c.pair(S::kLeft, i), low, high);
      auto* at = reinterpret_cast<FloatPair*>(x + c.col(i));
      const FloatPair before = *at;
      *at = FloatPair{before.low + step[h] * low, before.high + step[h] * high};
    }
  }
}

// One step from y: x, residual and direction of the rows that are active. With A p known, step = r.p / p.Ap and the next
// direction is made conjugate to p as it was rounded: r - (r.Ap / p.Ap) p.
template <class T, int D>
TILEWRIGHT_DEVICE void take_step(Consumer<T, D>& c, RowNumbers& n, float (&y)[D / 2], const float (&drift)[2],
                                 float* solutions, const Shape& shape, float max_iterations) {
  using S = FlashShape<T, D>;
  const float lambda[2] = {c.number(RowNumber::kLambda, 0), c.number(RowNumber::kLambda, 1)};
  float curvature[2] = {0.0f, 0.0f}, along[2] = {0.0f, 0.0f}, step[2], square[2] = {0.0f, 0.0f},
        mixed[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    const int h = i / 2 % 2;
    if (i % 16 == 0) c.forget_addresses();  // few loads under way at a time
    float mean[2], p[2];
    hopper::unpack_pair<T>(c.mean(i / 2), mean[0], mean[1]);
    hopper::unpack_pair<T>(c.pair(S::kLeft, i), p[0], p[1]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      y[i + e] = fmaf(y[i + e] - drift[h] * mean[e], n.inverse[h], lambda[h] * p[e]);
      curvature[h] += p[e] * y[i + e];
      along[h] += p[e] * c.residual(i + e);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    curvature[h] = quad_sum(curvature[h]);
    along[h] = quad_sum(along[h]);
    // Rounding or NaN: nothing to be gained along this direction.
    n.active[h] = n.active[h] && curvature[h] > 0.0f;
    step[h] = n.active[h] ? along[h] / curvature[h] : 0.0f;
  }
  move_solution(c, n, step, solutions, shape);
  c.forget_addresses();
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    const int h = i / 2 % 2;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float left = c.residual(i + e) - step[h] * y[i + e];
      if (n.active[h]) c.residual(i + e) = left;
      square[h] += left * left;
      mixed[h] += left * y[i + e];
      y[i + e] = left;
    }
  }
  float turn[2], unit[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    square[h] = quad_sum(square[h]);
    mixed[h] = quad_sum(mixed[h]);
    const float count = c.number(RowNumber::kCount, h) + 1.0f;
    const bool goes_on = n.active[h] && square[h] > c.number(RowNumber::kLimit, h) && count < max_iterations;
    __syncwarp();
    if (n.active[h]) c.set_number(RowNumber::kSquare, h, square[h]);
    if (n.active[h]) c.set_number(RowNumber::kCount, h, count);
    n.active[h] = goes_on;
    unit[h] = n.active[h] ? rsqrtf(square[h]) : 0.0f;
    turn[h] = n.active[h] ? mixed[h] / curvature[h] : 0.0f;
  }
  c.forget_addresses();
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    const int h = i / 2 % 2;
    float p[2];
    hopper::unpack_pair<T>(c.pair(S::kLeft, i), p[0], p[1]);
    c.pair(S::kLeft, i) =
        hopper::pack_pair<T>((y[i] - turn[h] * p[0]) * unit[h], (y[i + 1] - turn[h] * p[1]) * unit[h]);
  }
}

// Whether any row of the block goes on; `mine` gets whether any of the group's does. Also orders the left tiles, written by
// ordinary stores, before the products that read them.
template <class T, int D>
TILEWRIGHT_DEVICE bool decide(const Consumer<T, D>& c, const RowNumbers& n, int parity, bool& mine) {
  using S = FlashShape<T, D>;
  const int any = __any_sync(0xffffffffu, n.active[0] || n.active[1] ? 1 : 0) != 0 ? 1 : 0;
  int* flags = reinterpret_cast<int*>(c.memory + S::kFlags) + parity * 8;
  if (c.thread % 32 == 0) flags[c.group * 4 + c.thread / 32] = any;
  hopper::fence_async_shared();
  meet(kDecisionBarrier, kConsumers + 32);
  int total = 0, own = 0;
  for (int w = 0; w < 8; ++w) {
    total |= flags[w];
    if (w / 4 == c.group) own |= flags[w];
  }
  mine = own != 0;
  return total != 0;
}

// By the producer's first warp.
template <class T, int D>
TILEWRIGHT_DEVICE bool hear_decision(const char* memory, int parity) {
  using S = FlashShape<T, D>;
  meet(kDecisionBarrier, kConsumers + 32);
  const int* flags = reinterpret_cast<const int*>(memory + S::kFlags) + parity * 8;
  int total = 0;
  for (int w = 0; w < 8; ++w) total |= flags[w];
  return total != 0;
}

// What lambda counts for beside a covariance, as in row.cuh.
template <class T, int D>
TILEWRIGHT_DEVICE void set_ridges(const Consumer<T, D>& c, RowNumbers& n, const Options& options, const Shape& shape,
                                  const float* ridge) {
  constexpr float kMost = 1e30f;
  for (int h = 0; h < 2; ++h) {
    float lambda = 1.0f;
    if (c.valid(h) && n.inverse[h] != 0.0f) {
      const float factor = options.absolute ? fminf(exp2f(-n.peak[h]) * n.inverse[h], kMost) : 1.0f;
      const float given = ridge[c.at(h, shape)];
      lambda = given > 0.0f ? fminf(given * factor, kMost) : hopper::bits_float(0x7fc00000u);
      if (n.inverse[h] != n.inverse[h]) lambda = n.inverse[h];
    }
    c.set_number(RowNumber::kLambda, h, lambda);
  }
  __syncwarp();
}

template <class T, int D>
TILEWRIGHT_DEVICE void solve_rows(Consumer<T, D>& c, RowNumbers& n, float* solutions, const Options& options,
                                  const Shape& shape, float (&y)[D / 2]) {
  float* const x[2] = {solution_row(c, solutions, shape, 0), solution_row(c, solutions, shape, 1)};
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    const int h = i / 2 % 2;
    if (c.valid(h) && c.col(i) < shape.key_size) *reinterpret_cast<FloatPair*>(x[h] + c.col(i)) = FloatPair{0.0f, 0.0f};
  }
  const auto most = static_cast<float>(options.max_iterations);  // counts are exact in float32 up to 2^24
  bool mine;
  for (int parity = 0; decide(c, n, parity, mine); parity ^= 1) {
    float drift[2];
    apply_covariance(c, n, mine, y, drift);
    if (mine) take_step(c, n, y, drift, solutions, shape, most);
  }
}

}  // namespace tilewright::local_linear_attention::cuda
