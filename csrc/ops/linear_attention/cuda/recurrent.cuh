// SPDX-License-Identifier: Apache-2.0
// Token by token: decoding, and every input that the chunk form does not take. A warp holds a state's rows for some of
// its columns in registers; columns of a state do not interact, so warps need not meet.
//
// Lane = (group of columns, group of rows): a thread has kRows adjacent rows of kCols adjacent columns. Sums over rows
// end with shuffles between the lanes of one group of columns, in a fixed order.
#pragma once

#include "hopper/hopper.h"
#include "ops/linear_attention/cuda/problem.h"

namespace tilewright::linear_attention::cuda {

inline constexpr int kRecurrentRows = 16;
// Rows that the 32 lanes of a warp hold at most.
inline constexpr int kMaxRecurrentKeys = 32 * kRecurrentRows;

template <class In, class T>
struct RecurrentParams {
  Problem<In, T> problem;
  int row_lanes;  // a power of two, kRows times it covers K
  int tiles;  // blocks that share the columns of a state
  bool wide_rows;  // rows of q and k begin at multiples of 16 bytes
  bool wide_state;  // rows of states, too
};

namespace recurrent {

TILEWRIGHT_DEVICE float exponential(float x) { return expf(x); }
TILEWRIGHT_DEVICE double exponential(double x) { return exp(x); }

template <class T, class In>
TILEWRIGHT_DEVICE T widened(In x) {
  if constexpr (sizeof(In) == 8) {
    return x;
  } else {
    return hopper::to_float(x);
  }
}

template <class In, class T>
TILEWRIGHT_DEVICE In narrowed(T x) {
  if constexpr (sizeof(In) == 8) {
    return x;
  } else {
    return hopper::from_float<In>(x);
  }
}

// kRecurrentRows numbers of a row as they are stored, so that the next token's can wait in registers.
template <class In, class T>
struct Piece {
  static constexpr int kWords = kRecurrentRows * static_cast<int>(sizeof(In)) / 4;
  static constexpr bool kPacked = sizeof(In) == 2;
  T values[kPacked ? 1 : kRecurrentRows];
  uint32_t words[kPacked ? kWords : 1];

  TILEWRIGHT_DEVICE T operator[](int i) const {
    if constexpr (kPacked) {
      float low, high;
      hopper::unpack_pair<In>(words[i / 2], low, high);
      return i % 2 == 0 ? low : high;
    } else {
      return values[i];
    }
  }

  // count numbers, zero behind them.
  TILEWRIGHT_DEVICE void load(const In* from, int count, bool wide) {
    if constexpr (kPacked) {
      if (wide && count >= kRecurrentRows) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
          const hopper::U128 x = hopper::load_16(from + 2 * i);
          words[i] = x.x, words[i + 1] = x.y, words[i + 2] = x.z, words[i + 3] = x.w;
        }
        return;
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t low = 2 * i < count ? from[2 * i].bits : 0, high = 2 * i + 1 < count ? from[2 * i + 1].bits : 0;
        words[i] = low | high << 16;
      }
    } else {
      constexpr int kPer16 = 16 / static_cast<int>(sizeof(In));
      struct alignas(16) Vector {
        In x[kPer16];
      };
      if (wide && count >= kRecurrentRows) {
#pragma unroll
        for (int i = 0; i < kRecurrentRows; i += kPer16) {
          const Vector vector = *reinterpret_cast<const Vector*>(from + i);
#pragma unroll
          for (int j = 0; j < kPer16; ++j) values[i + j] = vector.x[j];
        }
        return;
      }
#pragma unroll
      for (int i = 0; i < kRecurrentRows; ++i) values[i] = i < count ? from[i] : In{0};
    }
  }
};

// A thread's piece of a state.
template <class T>
struct Tile {
  static constexpr int kCols = 16 / static_cast<int>(sizeof(T));
  struct alignas(16) Vector {
    T x[kCols];
  };
  T s[kRecurrentRows][kCols];

  TILEWRIGHT_DEVICE void zero() {
#pragma unroll
    for (int r = 0; r < kRecurrentRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) s[r][c] = T{0};
    }
  }

  // rows and columns: how many of them there are from this thread's first on.
  TILEWRIGHT_DEVICE void load(const T* from, int64_t stride, int rows, int columns, bool wide) {
#pragma unroll
    for (int r = 0; r < kRecurrentRows; ++r) {
      const T* row = from + r * stride;
      if (r < rows && wide && columns >= kCols) {
        const Vector vector = *reinterpret_cast<const Vector*>(row);
#pragma unroll
        for (int c = 0; c < kCols; ++c) s[r][c] = vector.x[c];
      } else {
#pragma unroll
        for (int c = 0; c < kCols; ++c) s[r][c] = r < rows && c < columns ? row[c] : T{0};
      }
    }
  }

  TILEWRIGHT_DEVICE void store(T* to, int64_t stride, int rows, int columns, bool wide) const {
#pragma unroll
    for (int r = 0; r < kRecurrentRows; ++r) {
      T* row = to + r * stride;
      if (r >= rows) continue;
      if (wide && columns >= kCols) {
        Vector vector;
#pragma unroll
        for (int c = 0; c < kCols; ++c) vector.x[c] = s[r][c];
        *reinterpret_cast<Vector*>(row) = vector;
      } else {
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
          if (c < columns) row[c] = s[r][c];
        }
      }
    }
  }
};

// Where a thread works.
struct Place {
  int64_t n, head, key_head;
  int64_t row, column;  // its first
  int rows, columns;  // how many there are from there on
  bool writes;  // of the lanes that hold the same columns, the one that stores them
};

template <class In, class T>
TILEWRIGHT_DEVICE Place place_of(const RecurrentParams<In, T>& params) {
  const Problem<In, T>& p = params.problem;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) / params.tiles;
  const int tile = static_cast<int>(static_cast<int64_t>(blockIdx.x) % params.tiles);
  const int lane = static_cast<int>(threadIdx.x) % 32, row_lane = lane % params.row_lanes;
  const int thread_columns = tile * (static_cast<int>(blockDim.x) / params.row_lanes) +
                             static_cast<int>(threadIdx.x) / 32 * (32 / params.row_lanes) + lane / params.row_lanes;
  Place at{};
  at.n = pair / p.value_heads;
  at.head = pair % p.value_heads;
  at.key_head = p.key_head(at.head);
  at.row = row_lane * kRecurrentRows;
  at.column = static_cast<int64_t>(thread_columns) * Tile<T>::kCols;
  at.rows = static_cast<int>(p.key_size - at.row);
  at.columns = static_cast<int>(p.value_size - at.column);
  at.writes = row_lane == 0;
  return at;
}

// Adds up over the lanes of a group of columns; every one of them gets the sum.
template <class T, int kCount>
TILEWRIGHT_DEVICE void sum_over_rows(T (&x)[kCount], int row_lanes) {
  for (int distance = 1; distance < row_lanes; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], distance);
  }
}

template <class In, class T>
TILEWRIGHT_DEVICE void decay(const Problem<In, T>& p, const Place& at, int64_t batch, int64_t token, Tile<T>& tile) {
  if (p.decay == Decay::kNone) return;
  const T* g = p.g.row(batch, token, at.head);
  const bool channels = p.decay == Decay::kChannel;
  const T shared = channels ? T{0} : exponential(g[0]);
#pragma unroll
  for (int r = 0; r < kRecurrentRows; ++r) {
    const T factor = !channels ? shared : r < at.rows ? exponential(g[at.row + r]) : T{0};
#pragma unroll
    for (int c = 0; c < Tile<T>::kCols; ++c) tile.s[r][c] *= factor;
  }
}

template <class In, class T>
struct Token {
  Piece<In, T> q, k;
  T v[Tile<T>::kCols];

  TILEWRIGHT_DEVICE void load(const RecurrentParams<In, T>& params, const Place& at, int64_t batch, int64_t token) {
    const Problem<In, T>& p = params.problem;
    q.load(p.q.row(batch, token, at.key_head) + at.row, at.rows, params.wide_rows);
    k.load(p.k.row(batch, token, at.key_head) + at.row, at.rows, params.wide_rows);
    const In* from = p.v.row(batch, token, at.head) + at.column;
#pragma unroll
    for (int c = 0; c < Tile<T>::kCols; ++c) v[c] = c < at.columns ? widened<T>(from[c]) : T{0};
  }
};

template <class In, class T>
TILEWRIGHT_DEVICE void store_row(In* to, const Place& at, const T (&x)[Tile<T>::kCols]) {
  if (!at.writes) return;
#pragma unroll
  for (int c = 0; c < Tile<T>::kCols; ++c) {
    if (c < at.columns) to[at.column + c] = narrowed<In>(x[c]);
  }
}

// The state S after decay; both sums over its rows at once, since after the write S^T q = (S before)^T q + (k . q) u.
template <class In, class T>
TILEWRIGHT_DEVICE void advance(const RecurrentParams<In, T>& params, const Place& at, int64_t batch, int64_t token,
                               const Token<In, T>& in, Tile<T>& tile) {
  constexpr int kCols = Tile<T>::kCols;
  const Problem<In, T>& p = params.problem;
  const bool delta = p.rule == Rule::kDelta;
  decay(p, at, batch, token, tile);
  T sums[2 * kCols + 1];  // S^T k, S^T q, k . q
#pragma unroll
  for (int i = 0; i < 2 * kCols + 1; ++i) sums[i] = T{0};
#pragma unroll
  for (int r = 0; r < kRecurrentRows; ++r) {
    const T k = in.k[r], q = in.q[r];
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      sums[c] += tile.s[r][c] * k;
      sums[kCols + c] += tile.s[r][c] * q;
    }
    sums[2 * kCols] += k * q;
  }
  sum_over_rows(sums, params.row_lanes);
  const T beta = delta ? p.beta.row(batch, token, at.head)[0] : T{1};
  T out[kCols], write[kCols];
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    write[c] = delta ? beta * (in.v[c] - sums[c]) : in.v[c];
    out[c] = p.scale * (sums[kCols + c] + sums[2 * kCols] * write[c]);
  }
#pragma unroll
  for (int r = 0; r < kRecurrentRows; ++r) {
    const T k = in.k[r];
#pragma unroll
    for (int c = 0; c < kCols; ++c) tile.s[r][c] += k * write[c];
  }
  store_row(p.out.row(batch, token, at.head), at, out);
}

template <class In, class T>
TILEWRIGHT_DEVICE void fill_rows(const Problem<In, T>& p, const Place& at, int64_t batch, int64_t first, int64_t last,
                                 T value) {
  T row[Tile<T>::kCols];
#pragma unroll
  for (int c = 0; c < Tile<T>::kCols; ++c) row[c] = value;
  for (int64_t t = first; t < last; ++t) store_row(p.out.row(batch, t, at.head), at, row);
}

}  // namespace recurrent

// kMany: any number of tokens, the next one's rows on their way while this one is worked on. Without: at most one token a
// sequence, in so few registers that two blocks of 256 threads fit on a multiprocessor; what takes time then are the
// loads and stores of states.
template <class In, class T, bool kMany>
__global__ void __launch_bounds__(256, sizeof(T) == 4 && !kMany ? 2 : 1)
    recurrent_kernel(const __grid_constant__ RecurrentParams<In, T> params) {
  using namespace recurrent;
  const Problem<In, T>& p = params.problem;
  const Place at = place_of(params);
  const Sequence sequence = sequence_of(p.sequences, at.n);
  const int64_t last = sequence.first + sequence.tokens;
  const int64_t slot = p.slots == nullptr ? at.n : p.slots[at.n];
  if (slot < 0 || slot >= p.slot_count) {
    fill_rows(p, at, sequence.batch, sequence.first, last, T(NAN));
    return;
  }
  const int64_t offset = (slot * p.value_heads + at.head) * p.state_size() + at.row * p.value_size + at.column;
  Tile<T> tile;
  if (p.initial == nullptr) {
    tile.zero();
  } else {
    tile.load(p.initial + offset, p.value_size, at.rows, at.columns, params.wide_state);
  }
  Token<In, T> now;
  if constexpr (!kMany) {
    if (sequence.tokens > 0) {
      now.load(params, at, sequence.batch, sequence.first);
      advance(params, at, sequence.batch, sequence.first, now, tile);
    }
  } else {
    // In double, two tokens at a time are more than the registers hold.
    constexpr bool kAhead = sizeof(T) == 4;
    Token<In, T> next;
    if (kAhead && sequence.tokens > 0) next.load(params, at, sequence.batch, sequence.first);
    for (int64_t t = sequence.first; t < last; ++t) {
      if constexpr (kAhead) {
        now = next;
        if (t + 1 < last) next.load(params, at, sequence.batch, t + 1);
      } else {
        now.load(params, at, sequence.batch, t);
      }
      advance(params, at, sequence.batch, t, now, tile);
    }
  }
  tile.store(p.state + offset, p.value_size, at.rows, at.columns, params.wide_state);
  // Rows behind the last packed sequence.
  if (p.sequences.offsets != nullptr && at.n == p.sequences.count - 1) {
    fill_rows(p, at, 0, last, p.sequences.tokens, T(0));
  }
}

}  // namespace tilewright::linear_attention::cuda
