// SPDX-License-Identifier: Apache-2.0
// Local linear attention (Zuo et al., arXiv 2510.01450) and Parallax (arXiv 2605.29157): forward and backward, in float
// or double. With softmax weights p_ij over the keys that query i sees, their mean kbar_i and covariance Cov_i,
//
//   o_i = sum_j p_ij (1 - (k_j - kbar_i).x_i) v_j,    (Cov_i + lambda_i I) x_i = kbar_i - q_i
//
// which is the regression of the paper with its intercept eliminated (README.md). Parallax takes x from outside.
#pragma once

#include <cstdint>

namespace tilewright::local_linear_attention {

inline constexpr int64_t kNoWindow = int64_t{1} << 62;

enum class Solver : uint8_t { kConjugateGradient = 0, kCholesky = 1, kGiven = 2 };

struct Options {
  double scale;  // of the scores, usually K^-1/2
  bool causal;  // query i of n sits at position S - n + i and sees keys up to there
  int64_t window;  // and of those only the last so many; kNoWindow for all
  Solver solver;
  double rtol;  // a row's conjugate gradients stop at |residual| <= rtol |right-hand side|
  int64_t max_iterations;
  bool jacobi;  // divide by the diagonal
  bool absolute;  // lambda counts against weights exp(scale q.k) instead of weights of sum 1
  bool ridge_grad;  // false: the published gradient, in which lambda omega is a constant
};

// One sequence: rows of q and rows of k and v. Keys beyond a cache's length are not part of it.
struct Segment {
  int64_t first_query, queries, first_key, keys;
};

struct Shape {
  int64_t heads, kv_heads;  // HQ a multiple of H; query head h reads key head h / (HQ / H)
  int64_t key_size, value_size;  // K, V

  int64_t group() const { return heads / kv_heads; }
};

// What the forward pass says of a row beside its solution x.
struct RowRecord {
  static constexpr int64_t kSize = 4;
  static constexpr int64_t kPeak = 0;  // largest score, keys taken from the centre of the row's block
  static constexpr int64_t kOmega = 1;  // sum of exp(score - peak)
  static constexpr int64_t kLeverage = 2;  // (kbar - q).x
  static constexpr int64_t kResidual = 3;  // |residual| / |right-hand side| where the solver stopped
};

// All arrays are dense; N is the number of query rows in all, M that of key rows.
template <class T>
struct Forward {
  Shape shape;
  Options options;
  const T* q;  // [N, HQ, K]
  const T* k;  // [M, H, K]
  const T* v;  // [M, H, V]
  const T* ridge;  // [N, HQ]; null for kGiven
  const T* start;  // [N, HQ, K]: x for kGiven, else where the iterations begin (any multiple of it), or null
  T* o;  // [N, HQ, V]
  T* x;  // [N, HQ, K]; null for kGiven
  T* rows;  // [N, HQ, RowRecord::kSize]; null for kGiven
  int32_t* iterations;  // [N, HQ]; null for kGiven
};

// What the pass over queries leaves for the pass over keys.
struct GradRecord {
  static constexpr int64_t kSize = 6;
  static constexpr int64_t kKeyX = 0;  // kbar.x, both from the block's centre
  static constexpr int64_t kKeyU = 1;  // kbar.u
  static constexpr int64_t kValue = 2;  // sum_j p_j gamma_j, gamma_j = do.v_j
  static constexpr int64_t kMean = 3;  // what is taken off e_j a_j in the gradient of a score
  static constexpr int64_t kPeak = 4, kOmega = 5;
};

template <class T>
struct Backward {
  Shape shape;
  Options options;
  const T* q;  // as in Forward
  const T* k;
  const T* v;
  const T* ridge;
  const T* x;  // [N, HQ, K], the forward pass's solution, or Parallax's r
  const T* grad;  // [N, HQ, V]
  T* dq;  // [N, HQ, K]
  T* dk;  // [M, H, K]
  T* dv;  // [M, H, V]
  T* dridge;  // [N, HQ]; null for kGiven
  T* dx;  // [N, HQ, K] for kGiven, else null
  T* u;  // [N, HQ, K], workspace: the second solution; null for kGiven
  T* records;  // [N, HQ, GradRecord::kSize], workspace
  T* centres;  // [plan.blocks, K], workspace: what each block of queries takes off its keys
};

}  // namespace tilewright::local_linear_attention
