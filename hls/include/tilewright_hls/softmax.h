// SPDX-License-Identifier: Apache-2.0
// Attention: one recurrence, two schedules. RPA (reversed, reordered prefill attention) holds P queries and streams keys and
// values once for them, newest first; DA (decode attention) streams the keys, keeps the scores, then streams the values.
// docs/reference/accelerator-contract.md, "Attention". Python: edge/contract/softmax.py.
#pragma once

#include "tilewright_hls/frames.h"

namespace tilewright_hls {

inline constexpr int kMaxContext = 4096;

struct AttentionShape {
  int heads, kv_heads, head_size;
  Factor score;  // log2(e) / sqrt(head_size)
  int width() const { return heads * head_size; }
  int kv_width() const { return kv_heads * head_size; }
};

// Of one query and head.
struct SoftmaxState {
  ap_int<15> top = -8192, value_top = -8224;
  ap_uint<34> total = 0;
};

// What one key contributes: shifts of what is there, and its own weight for the sum and for the values.
struct SoftmaxStep {
  Wide sums_shift;
  ap_uint<21> value_weight;
};

inline ap_uint<16> exp2_fraction(Wide f) {
#pragma HLS inline
  const int index = static_cast<int>(f >> 7);
  return kExp2[index] + ((kExp2[index + 1] - kExp2[index]) * (f & 127) >> 7);
}

// Steps 1 and 2 of the contract, from the dot product on.
inline ap_int<28> score_of(ap_int<43> dot, Wide q_top, Wide k_top, const Factor& factor, StatusWord& status) {
#pragma HLS inline
  constexpr Wide kLimit = Wide{1} << 27;
  const ap_int<27> high = static_cast<Wide>(dot) >> 16;
  const ap_int<44> product = static_cast<Wide>(high) * static_cast<Wide>(factor.mantissa);
  const Wide shift = q_top + k_top + factor.exponent + 18;
  Wide wide = shift < 0 ? shift_down(product, -shift) : static_cast<Wide>(product) << (shift > 18 ? 18 : shift);
  raise(status, kScoreClamp, wide < -kLimit || wide >= kLimit);
  if (wide < -kLimit) wide = -kLimit;
  return wide >= kLimit ? kLimit - 1 : wide;
}

// Steps 3 to 5 but for the vector of values.
inline SoftmaxStep advance(SoftmaxState& state, ap_int<28> score, Wide v_top) {
#pragma HLS inline
  const Wide whole = static_cast<Wide>(score) >> 14;
  const ap_uint<21> weight = static_cast<Wide>(exp2_fraction(static_cast<Wide>(score) & 16383)) << 5;
  const Wide top = whole > state.top ? whole : static_cast<Wide>(state.top);
  state.total = shift_down(state.total, top - state.top) + shift_down(weight, top - whole);
  state.top = top;
  const Wide value_top = whole + v_top > state.value_top ? whole + v_top : static_cast<Wide>(state.value_top);
  const SoftmaxStep step{value_top - state.value_top, shift_down(weight, value_top - whole - v_top)};
  state.value_top = value_top;
  return step;
}

inline void add_values(ap_int<48>* sums, const ap_int<15>* v, const SoftmaxStep& step, int count) {
  for (int i = 0; i < count; ++i) {
#pragma HLS unroll factor = 16
    sums[i] = shift_down(sums[i], step.sums_shift) + static_cast<Wide>(v[i]) * static_cast<Wide>(step.value_weight);
  }
}

inline Half finished(ap_int<48> sum, const SoftmaxState& state, StatusWord& status) {
  const int length = bit_length(state.total);
  const ap_uint<17> reciprocal = divide((Wide{1} << 33) - 1, static_cast<Wide>(state.total) >> (length - 17), 33);
  const ap_int<58> product = (static_cast<Wide>(sum) >> 8) * static_cast<Wide>(reciprocal);
  return pack(product, state.value_top - state.top - length - 11, status);
}

// A row of heads as integers, one exponent a head.
template <int W>
void align_heads(const Half* row, int heads, int size, ap_int<W + 1>* out, ap_int<6>* tops, StatusWord& status) {
  for (int head = 0; head < heads; ++head) {
    Wide top = kMinExponent;
    for (int i = 0; i < size; ++i) {
#pragma HLS unroll factor = 16
      const Split x = split(row[head * size + i], status);
      if (x.exponent > top) top = x.exponent;
    }
    for (int i = 0; i < size; ++i) {
#pragma HLS unroll factor = 16
      out[head * size + i] = aligned<W>(split(row[head * size + i], status), top);
    }
    tops[head] = top;
  }
}

inline Wide dot(const ap_int<18>* a, const ap_int<18>* b, int count) {
  Wide sum = 0;
  for (int i = 0; i < count; ++i) {
#pragma HLS unroll factor = 16
    sum += static_cast<Wide>(a[i]) * static_cast<Wide>(b[i]);
  }
  return sum;
}

// The cache in external memory: position t at row capacity - 1 - t, so that newest first is an incrementing burst.
struct CachePort {
  const Half* keys;
  const Half* values;
  int capacity;
  const Half* key(int t, int width) const { return keys + static_cast<long>(capacity - 1 - t) * width; }
  const Half* value(int t, int width) const { return values + static_cast<long>(capacity - 1 - t) * width; }
};

struct Traffic {
  long key_rows = 0, value_rows = 0;
};

template <int L>
void read_row(hls::stream<HalfBeat<L>>& in, Half* row, int width, StatusWord& status) {
  RowReader<Half, L> reader(in, beats_for(width, L), status);
  for (int beat = 0; beat < beats_for(width, L); ++beat) {
#pragma HLS pipeline II = 1
    const HalfBeat<L> got = reader.next();
    for (int i = 0; i < L && beat * L + i < width; ++i) row[beat * L + i] = got.at[i];
  }
}

template <int L>
void write_row(hls::stream<HalfBeat<L>>& out, const ap_int<48>* sums, const SoftmaxState* state,
               const AttentionShape& shape, StatusWord& status) {
  const int beats = beats_for(shape.width(), L);
  for (int beat = 0; beat < beats; ++beat) {
    HalfBeat<L> made;
    for (int i = 0; i < L && beat * L + i < shape.width(); ++i) {
      const int at = beat * L + i;
      made.at[i] = finished(sums[at], state[at / shape.head_size], status);
    }
    made.last = beat == beats - 1;
    out.write(made);
  }
}

template <int P, int MaxWidth, int MaxHeads>
struct RpaBuffers {
  Half row[MaxWidth];
  ap_int<18> q[P][MaxWidth], k[MaxWidth];
  ap_int<15> v[MaxWidth];
  ap_int<6> q_top[P][MaxHeads], k_top[MaxHeads], v_top[MaxHeads];
  SoftmaxState state[P][MaxHeads];
  ap_int<48> sums[P][MaxWidth];
};

inline bool attention_fits(const AttentionShape& shape, int keys, int max_width, int max_heads) {
  return shape.width() <= max_width && shape.heads <= max_heads && shape.head_size <= 256 && keys <= kMaxContext &&
         shape.heads % shape.kv_heads == 0;
}

// Queries come and results leave newest token first.
template <int P, int L, int MaxWidth, int MaxHeads>
void rpa(hls::stream<HalfBeat<L>>& q, const CachePort& cache, RpaBuffers<P, MaxWidth, MaxHeads>& own,
         hls::stream<HalfBeat<L>>& out, const AttentionShape& shape, int tokens, Traffic& traffic, StatusWord& status) {
#pragma HLS array_partition variable = own.q dim = 1 complete
#pragma HLS array_partition variable = own.sums dim = 1 complete
  const bool fits = attention_fits(shape, tokens, MaxWidth, MaxHeads) && tokens <= cache.capacity;
  raise(status, kBadDescriptor, !fits);
  if (!fits) return;
  const int size = shape.head_size, group = shape.heads / shape.kv_heads;
  for (int high = tokens - 1; high >= 0; high -= P) {
    const int queries = high + 1 < P ? high + 1 : P;
    for (int p = 0; p < queries; ++p) {
      read_row(q, own.row, shape.width(), status);
      align_heads<17>(own.row, shape.heads, size, own.q[p], own.q_top[p], status);
      for (int head = 0; head < shape.heads; ++head) own.state[p][head] = {};
      for (int i = 0; i < shape.width(); ++i) own.sums[p][i] = 0;
    }
    for (int j = high; j >= 0; --j) {
      align_heads<17>(cache.key(j, shape.kv_width()), shape.kv_heads, size, own.k, own.k_top, status);
      align_heads<14>(cache.value(j, shape.kv_width()), shape.kv_heads, size, own.v, own.v_top, status);
      ++traffic.key_rows;
      ++traffic.value_rows;
      for (int head = 0; head < shape.heads; ++head) {
        const int kv = head / group;
        for (int p = 0; p < queries; ++p) {
#pragma HLS unroll
          if (j > high - p) continue;
          const Wide d = dot(own.q[p] + head * size, own.k + kv * size, size);
          const ap_int<28> score = score_of(d, own.q_top[p][head], own.k_top[kv], shape.score, status);
          const SoftmaxStep step = advance(own.state[p][head], score, own.v_top[kv]);
          add_values(own.sums[p] + head * size, own.v + kv * size, step, size);
        }
      }
    }
    for (int p = 0; p < queries; ++p) write_row(out, own.sums[p], own.state[p], shape, status);
  }
}

template <int MaxWidth, int MaxHeads, int MaxKeys>
struct DaBuffers {
  Half row[MaxWidth];
  ap_int<18> q[MaxWidth], k[MaxWidth];
  ap_int<15> v[MaxWidth];
  ap_int<6> q_top[MaxHeads], k_top[MaxHeads], v_top[MaxHeads];
  ap_int<28> score[MaxKeys][MaxHeads];
  SoftmaxState state[MaxHeads];
  ap_int<48> sums[MaxWidth];
};

// One query over keys newest .. 0. Both passes are bound by memory, so they are not fused.
template <int L, int MaxWidth, int MaxHeads, int MaxKeys>
void da(hls::stream<HalfBeat<L>>& q, const CachePort& cache, DaBuffers<MaxWidth, MaxHeads, MaxKeys>& own,
        hls::stream<HalfBeat<L>>& out, const AttentionShape& shape, int keys, Traffic& traffic, StatusWord& status) {
  const bool fits = attention_fits(shape, keys, MaxWidth, MaxHeads) && keys <= cache.capacity && keys <= MaxKeys;
  raise(status, kBadDescriptor, !fits || keys < 1);
  if (!fits || keys < 1) return;
  const int size = shape.head_size, group = shape.heads / shape.kv_heads;
  read_row(q, own.row, shape.width(), status);
  align_heads<17>(own.row, shape.heads, size, own.q, own.q_top, status);
  for (int j = keys - 1; j >= 0; --j) {
    align_heads<17>(cache.key(j, shape.kv_width()), shape.kv_heads, size, own.k, own.k_top, status);
    ++traffic.key_rows;
    for (int head = 0; head < shape.heads; ++head) {
      const int kv = head / group;
      const Wide d = dot(own.q + head * size, own.k + kv * size, size);
      own.score[j][head] = score_of(d, own.q_top[head], own.k_top[kv], shape.score, status);
    }
  }
  for (int head = 0; head < shape.heads; ++head) own.state[head] = {};
  for (int i = 0; i < shape.width(); ++i) own.sums[i] = 0;
  for (int j = keys - 1; j >= 0; --j) {
    align_heads<14>(cache.value(j, shape.kv_width()), shape.kv_heads, size, own.v, own.v_top, status);
    ++traffic.value_rows;
    for (int head = 0; head < shape.heads; ++head) {
      const int kv = head / group;
      const SoftmaxStep step = advance(own.state[head], own.score[j][head], own.v_top[kv]);
      add_values(own.sums + head * size, own.v + kv * size, step, size);
    }
  }
  write_row(out, own.sums, own.state, shape, status);
}

}  // namespace tilewright_hls
