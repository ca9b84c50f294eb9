// SPDX-License-Identifier: Apache-2.0
// The sweeps of the plain gradient; what they are is said in backward_plain.h.
//
// Thread (r, c) of a block, r = thread / 8 and c = thread % 8, holds rows r + 32 m and columns 4 c to 4 c + 3 of the state:
// a product over columns ends in three shuffles, one over rows in two shuffles and a sum over the 8 warps.
#pragma once

#include <cmath>

#include "hopper/hopper.h"
#include "ops/linear_attention/cuda/backward_plain.h"

namespace tilewright::linear_attention::cuda::plain {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kRowThreads = 32;
inline constexpr int kMaxKeySize = PlainBackward<float>::kMaxKeySize;
inline constexpr int kColumns = PlainBackward<float>::kColumns;
inline constexpr int kMaxRows = kMaxKeySize / kRowThreads;  // of a thread
inline constexpr int kStage = 8;  // tokens that are brought to shared memory at once
// A decay whose exponential is 0 in every precision; keeps -inf out of differences.
inline constexpr double kLeastLog = -10000.0;

template <class T>
struct Stage {
  T q[kStage][kMaxKeySize], k[kStage][kMaxKeySize], decay[kStage][kMaxKeySize];
  T value[kStage][kColumns], d_out[kStage][kColumns], error[kStage][kColumns];
  T beta[kStage];
  T sums[2][kWarps][kColumns];
};

// What a block works on.
struct Place {
  int tile, head;
  int64_t sequence, place, batch, first, last;
  int r, c;
};

template <class T>
TILEWRIGHT_DEVICE Place place_of(const PlainBackward<T>& p) {
  Place at;
  int64_t block = blockIdx.x;
  at.tile = static_cast<int>(block % p.tiles);
  block /= p.tiles;
  at.head = static_cast<int>(block % p.value_heads);
  at.sequence = block / p.value_heads;
  const Sequence s = sequence_of(p.sequences, at.sequence);
  at.place = s.place;
  at.batch = s.batch;
  at.first = s.first;
  at.last = s.first + s.tokens;
  at.r = static_cast<int>(threadIdx.x) / 8;
  at.c = static_cast<int>(threadIdx.x) % 8;
  return at;
}

template <class T>
TILEWRIGHT_DEVICE const T* row(const Rows<const T>& rows, int64_t batch, int64_t token, int64_t head) {
  return rows.data + batch * rows.batch + token * rows.token + head * rows.head;
}

// A token of a head in a contiguous [B, T, HV, ...].
template <class T>
TILEWRIGHT_DEVICE int64_t token_of(const PlainBackward<T>& p, const Place& at, int64_t t) {
  return (at.batch * p.sequences.tokens + t) * p.value_heads + at.head;
}

template <class T>
TILEWRIGHT_DEVICE T decay_of(T log) {
  const T least = static_cast<T>(kLeastLog);
  return std::exp(log < least ? least : log);
}

// Tokens [t0, t0 + count) to shared memory, zero where a row or column does not exist.
template <class T>
TILEWRIGHT_DEVICE void load_stage(const PlainBackward<T>& p, const Place& at, int64_t t0, int count, bool errors,
                                  Stage<T>& stage) {
  const int64_t group = p.value_heads / p.heads;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count * kMaxKeySize; i += kThreads) {
    const int t = i / kMaxKeySize, d = i % kMaxKeySize;
    const bool inside = d < p.key_size;
    stage.q[t][d] = inside ? row(p.q, at.batch, t0 + t, at.head / group)[d] : T{0};
    stage.k[t][d] = inside ? row(p.k, at.batch, t0 + t, at.head / group)[d] : T{0};
    if (p.decay == Decay::kNone) continue;
    const T* g = row(p.g, at.batch, t0 + t, at.head);
    stage.decay[t][d] = inside ? decay_of(p.decay == Decay::kChannel ? g[d] : g[0]) : T{0};
  }
  for (int i = static_cast<int>(threadIdx.x); i < count * kColumns; i += kThreads) {
    const int t = i / kColumns, d = at.tile * kColumns + i % kColumns;
    const bool inside = d < p.value_size;
    stage.value[t][i % kColumns] = inside ? row(p.v, at.batch, t0 + t, at.head)[d] : T{0};
    stage.d_out[t][i % kColumns] = inside ? row(p.d_out, at.batch, t0 + t, at.head)[d] : T{0};
    if (errors) stage.error[t][i % kColumns] = inside ? p.errors[token_of(p, at, t0 + t) * p.value_size + d] : T{0};
  }
  for (int t = static_cast<int>(threadIdx.x); t < count; t += kThreads) {
    stage.beta[t] = p.rule == Rule::kDelta ? row(p.beta, at.batch, t0 + t, at.head)[0] : T{1};
  }
  __syncthreads();
}

template <class T>
struct State {
  T at[kMaxRows][4];
};

template <class T>
TILEWRIGHT_DEVICE int64_t state_index(const PlainBackward<T>& p, const Place& at, int64_t place, int m, int x,
                                      bool& inside) {
  const int d = at.r + kRowThreads * m, v = at.tile * kColumns + 4 * at.c + x;
  inside = d < p.key_size && v < p.value_size;
  return ((place * p.value_heads + at.head) * p.key_size + d) * p.value_size + v;
}

template <class T>
TILEWRIGHT_DEVICE void load_state(const PlainBackward<T>& p, const Place& at, const T* from, int64_t place,
                                  State<T>& state) {
#pragma unroll
  for (int m = 0; m < kMaxRows; ++m) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      bool inside;
      const int64_t i = state_index(p, at, place, m, x, inside);
      state.at[m][x] = from != nullptr && inside ? from[i] : T{0};
    }
  }
}

template <class T>
TILEWRIGHT_DEVICE void store_state(const PlainBackward<T>& p, const Place& at, const State<T>& state, T* to,
                                   int64_t place) {
#pragma unroll
  for (int m = 0; m < kMaxRows; ++m) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      bool inside;
      const int64_t i = state_index(p, at, place, m, x, inside);
      if (inside) to[i] = state.at[m][x];
    }
  }
}

template <class T>
TILEWRIGHT_DEVICE void decay_state(const PlainBackward<T>& p, const Place& at, const T* decay, State<T>& state) {
  if (p.decay == Decay::kNone) return;
#pragma unroll
  for (int m = 0; m < kMaxRows; ++m) {
    const T factor = decay[at.r + kRowThreads * m];
#pragma unroll
    for (int x = 0; x < 4; ++x) state.at[m][x] *= factor;
  }
}

// S += factor x y^T.
template <class T>
TILEWRIGHT_DEVICE void add_outer(const Place& at, T factor, const T* x, const T (&y)[4], State<T>& state) {
#pragma unroll
  for (int m = 0; m < kMaxRows; ++m) {
    const T left = factor * x[at.r + kRowThreads * m];
#pragma unroll
    for (int i = 0; i < 4; ++i) state.at[m][i] += left * y[i];
  }
}

// S^T x for this thread's columns. sums changes place every token, so that one barrier a token is enough.
template <class T>
TILEWRIGHT_DEVICE void over_rows(const Place& at, const State<T>& state, const T* x, T (&sums)[kWarps][kColumns],
                                 T (&result)[4]) {
  T part[4] = {};
#pragma unroll
  for (int m = 0; m < kMaxRows; ++m) {
    const T factor = x[at.r + kRowThreads * m];
#pragma unroll
    for (int i = 0; i < 4; ++i) part[i] += factor * state.at[m][i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    part[i] += __shfl_xor_sync(0xffffffffu, part[i], 8);
    part[i] += __shfl_xor_sync(0xffffffffu, part[i], 16);
  }
  if (threadIdx.x % 32 < 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[threadIdx.x / 32][4 * at.c + i] = part[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    result[i] = T{0};
    for (int w = 0; w < kWarps; ++w) result[i] += sums[w][4 * at.c + i];
  }
}

template <class T>
TILEWRIGHT_DEVICE T over_lanes(T part) {
  part += __shfl_xor_sync(0xffffffffu, part, 1);
  part += __shfl_xor_sync(0xffffffffu, part, 2);
  part += __shfl_xor_sync(0xffffffffu, part, 4);
  return part;
}

// factor S y over this block's columns, written as the block's part of a row of K.
template <class T>
TILEWRIGHT_DEVICE void over_columns(const PlainBackward<T>& p, const Place& at, const State<T>& state, T factor,
                                    const T (&y)[4], T* to) {
#pragma unroll
  for (int m = 0; m < kMaxRows; ++m) {
    const int d = at.r + kRowThreads * m;
    if (kRowThreads * m >= p.key_size) break;
    T part = T{0};
#pragma unroll
    for (int i = 0; i < 4; ++i) part += state.at[m][i] * y[i];
    part = over_lanes(part);
    if (at.c == 0 && d < p.key_size) to[d] = factor * part;
  }
}

template <class T>
TILEWRIGHT_DEVICE T* part_of(const PlainBackward<T>& p, const Place& at, T* parts, int64_t t) {
  return parts + (token_of(p, at, t) * p.tiles + at.tile) * p.key_size;
}

template <class T>
TILEWRIGHT_DEVICE void columns_of(const Place& at, const T (&row)[kColumns], T (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = row[4 * at.c + i];
}

// Whether token t is the last of its chunk.
TILEWRIGHT_DEVICE bool ends_chunk(const Place& at, int64_t t) {
  return t + 1 == at.last || (t + 1 - at.first) % kChunk == 0;
}

TILEWRIGHT_DEVICE int64_t place_of(const Place& at, int64_t t) { return at.place + (t - at.first) / kChunk; }

template <class T>
TILEWRIGHT_DEVICE int64_t initial_of(const PlainBackward<T>& p, const Place& at) {
  return p.initial_by_chunk ? at.place : at.sequence;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) errors_kernel(const __grid_constant__ PlainBackward<T> p) {
  auto& stage = *reinterpret_cast<Stage<T>*>(hopper::shared_memory());
  const Place at = place_of(p);
  State<T> state;
  load_state(p, at, at.first == at.last ? nullptr : p.initial_state, initial_of(p, at), state);
  for (int64_t t0 = at.first; t0 < at.last; t0 += kStage) {
    const int count = static_cast<int>(at.last - t0 < kStage ? at.last - t0 : kStage);
    load_stage(p, at, t0, count, false, stage);
    for (int t = 0; t < count; ++t) {
      decay_state(p, at, stage.decay[t], state);
      T error[4], value[4];
      over_rows(at, state, stage.k[t], stage.sums[t % 2], error);
      columns_of(at, stage.value[t], value);
#pragma unroll
      for (int i = 0; i < 4; ++i) error[i] = value[i] - error[i];
      add_outer(at, stage.beta[t], stage.k[t], error, state);
      for (int i = 0; i < 4; ++i) {
        const int v = at.tile * kColumns + 4 * at.c + i;
        if (at.r == 0 && v < p.value_size) p.errors[token_of(p, at, t0 + t) * p.value_size + v] = error[i];
      }
    }
  }
}

// dU of a token is the gradient of what it writes; of the delta rule dY = dU too, before beta.
template <class T>
TILEWRIGHT_DEVICE void reverse_token(const PlainBackward<T>& p, const Place& at, Stage<T>& stage, int t, int64_t token,
                                     State<T>& d_state) {
  T d_out[4], d_write[4], write[4];
  columns_of(at, stage.d_out[t], d_out);
  add_outer(at, p.scale, stage.q[t], d_out, d_state);
  over_rows(at, d_state, stage.k[t], stage.sums[t % 2], d_write);
  const bool delta = p.rule == Rule::kDelta;
  columns_of(at, delta ? stage.error[t] : stage.value[t], write);
  over_columns(p, at, d_state, stage.beta[t], write, part_of(p, at, p.dk_write_parts, token));
  if (delta) {
    T d_beta = T{0};
#pragma unroll
    for (int i = 0; i < 4; ++i) d_beta += d_write[i] * write[i];
    d_beta = over_lanes(d_beta);
    if (threadIdx.x == 0) p.d_beta_parts[token_of(p, at, token) * p.tiles + at.tile] = d_beta;
    add_outer(at, -stage.beta[t], stage.k[t], d_write, d_state);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int v = at.tile * kColumns + 4 * at.c + i;
    if (at.r == 0 && v < p.value_size) {
      p.dv[token_of(p, at, token) * p.value_size + v] = stage.beta[t] * d_write[i];
    }
  }
  decay_state(p, at, stage.decay[t], d_state);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) reverse_kernel(const __grid_constant__ PlainBackward<T> p) {
  auto& stage = *reinterpret_cast<Stage<T>*>(hopper::shared_memory());
  const Place at = place_of(p);
  State<T> d_state;
  load_state(p, at, p.d_final_state, at.sequence, d_state);
  for (int64_t end = at.last; end > at.first; end -= kStage) {
    const int64_t t0 = end - kStage < at.first ? at.first : end - kStage;
    load_stage(p, at, t0, static_cast<int>(end - t0), p.rule == Rule::kDelta, stage);
    for (int t = static_cast<int>(end - t0) - 1; t >= 0; --t) {
      if (p.decay != Decay::kNone && ends_chunk(at, t0 + t)) {
        store_state(p, at, d_state, p.d_states, place_of(at, t0 + t));
      }
      reverse_token(p, at, stage, t, t0 + t, d_state);
    }
  }
  store_state(p, at, d_state, p.d_initial_state, at.sequence);
}

// Row sums of dS o S where a chunk ends.
template <class T>
TILEWRIGHT_DEVICE void store_anchors(const PlainBackward<T>& p, const Place& at, const State<T>& state, int64_t place) {
  State<T> d_state;
  load_state(p, at, p.d_states, place, d_state);
  T* to = p.anchors + ((place * p.value_heads + at.head) * p.tiles + at.tile) * p.key_size;
#pragma unroll
  for (int m = 0; m < kMaxRows; ++m) {
    const int d = at.r + kRowThreads * m;
    if (kRowThreads * m >= p.key_size) break;
    T part = T{0};
#pragma unroll
    for (int i = 0; i < 4; ++i) part += state.at[m][i] * d_state.at[m][i];
    part = over_lanes(part);
    if (at.c == 0 && d < p.key_size) to[d] = part;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ PlainBackward<T> p) {
  auto& stage = *reinterpret_cast<Stage<T>*>(hopper::shared_memory());
  const Place at = place_of(p);
  const bool delta = p.rule == Rule::kDelta;
  State<T> state;
  load_state(p, at, at.first == at.last ? nullptr : p.initial_state, initial_of(p, at), state);
  for (int64_t t0 = at.first; t0 < at.last; t0 += kStage) {
    const int count = static_cast<int>(at.last - t0 < kStage ? at.last - t0 : kStage);
    load_stage(p, at, t0, count, delta, stage);
    for (int t = 0; t < count; ++t) {
      decay_state(p, at, stage.decay[t], state);
      T write[4], d_out[4], d_error[4];
      if (delta) {
        for (int i = 0; i < 4; ++i) {
          const int v = at.tile * kColumns + 4 * at.c + i;
          d_error[i] = v < p.value_size ? p.dv[token_of(p, at, t0 + t) * p.value_size + v] : T{0};
        }
        over_columns(p, at, state, T{-1}, d_error, part_of(p, at, p.dk_read_parts, t0 + t));
      }
      columns_of(at, delta ? stage.error[t] : stage.value[t], write);
      add_outer(at, stage.beta[t], stage.k[t], write, state);
      columns_of(at, stage.d_out[t], d_out);
      over_columns(p, at, state, p.scale, d_out, part_of(p, at, p.dq_parts, t0 + t));
      if (p.decay != Decay::kNone && ends_chunk(at, t0 + t)) {
        store_anchors(p, at, state, place_of(at, t0 + t));
      }
    }
  }
}

template <class T>
TILEWRIGHT_DEVICE T sum_tiles(const PlainBackward<T>& p, const T* parts, int64_t step) {
  T sum = T{0};
  for (int tile = 0; tile < p.tiles; ++tile) sum += parts[tile * step];
  return sum;
}

// dg_t = sum over s >= t of the chunk of (q dq + k dk_read - k dk_write)_s, plus dS o S at its end. A sum of differences: in
// double, so that only the terms are rounded.
template <class T>
__global__ void __launch_bounds__(kMaxKeySize, 1) collect_kernel(const __grid_constant__ PlainBackward<T> p) {
  auto* terms = reinterpret_cast<double*>(hopper::shared_memory());  // one a warp, then their sum
  const int d = static_cast<int>(threadIdx.x);
  const int head = static_cast<int>(blockIdx.x % p.value_heads);
  const int64_t place = blockIdx.x / p.value_heads;
  const Chunk chunk = chunk_at(p.sequences, place);
  if (chunk.rows == 0) return;
  const bool delta = p.rule == Rule::kDelta, channel = p.decay == Decay::kChannel, inside = d < p.key_size;
  const int64_t anchor = (place * p.value_heads + head) * p.tiles * p.key_size + d;
  double sum = 0;
  if (p.decay != Decay::kNone && inside) sum = static_cast<double>(sum_tiles(p, p.anchors + anchor, p.key_size));
  for (int i = chunk.rows - 1; i >= 0; --i) {
    const int64_t t = chunk.first + i;
    const int64_t token = (chunk.batch * p.sequences.tokens + t) * p.value_heads + head;
    if (inside) {
      const int64_t at = token * p.tiles * p.key_size + d;
      const T q = row(p.q, chunk.batch, t, head / (p.value_heads / p.heads))[d];
      const T k = row(p.k, chunk.batch, t, head / (p.value_heads / p.heads))[d];
      const T dq = sum_tiles(p, p.dq_parts + at, p.key_size);
      const T read = delta ? sum_tiles(p, p.dk_read_parts + at, p.key_size) : T{0};
      const T write = sum_tiles(p, p.dk_write_parts + at, p.key_size);
      p.dq[token * p.key_size + d] = dq;
      p.dk[token * p.key_size + d] = read + write;
      sum += static_cast<double>(q) * static_cast<double>(dq) +
             static_cast<double>(k) * (static_cast<double>(read) - static_cast<double>(write));
      if (channel) p.dg[token * p.key_size + d] = static_cast<T>(sum);
    }
    if (delta && d == 0) p.d_beta[token] = sum_tiles(p, p.d_beta_parts + token * p.tiles, 1);
    if (p.decay == Decay::kToken) {
      double total = sum;
      for (int lane = 16; lane > 0; lane /= 2) total += __shfl_xor_sync(0xffffffffu, total, lane);
      if (d % 32 == 0) terms[d / 32] = total;
      __syncthreads();
      if (d == 0) {
        total = 0;
        for (int w = 0; w < kMaxKeySize / 32; ++w) total += terms[w];
        p.dg[token] = static_cast<T>(total);
      }
      __syncthreads();
    }
  }
}

}  // namespace tilewright::linear_attention::cuda::plain
