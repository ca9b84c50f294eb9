// SPDX-License-Identifier: Apache-2.0
// Table-lookup product with ternary weights (TLMM), its weight buffer and the loader (WBMU).
#pragma once

#include "tilewright_hls/frames.h"

namespace tilewright_hls {

constexpr int power_of_three(int g) { return g == 0 ? 1 : 3 * power_of_three(g - 1); }
constexpr int bits_for(int codes) {
  int bits = 0;
  while ((1 << bits) < codes) ++bits;
  return bits;
}

template <int G, int T>
struct IndexVector {
  static constexpr int kCodes = power_of_three(G);
  static constexpr int kBits = bits_for(kCodes);
  static constexpr int kWidth = T * kBits;
  ap_uint<kBits> at[T];
};

// Q / 2 banks with two ports each: Q neighbouring outputs of a block are one cycle. Two URAMs side by side hold a word of
// 140 bits, so the paper's 9408 words a bank are 3 x 2 x 8 = 48 URAMs at Q = 16.
template <int G, int T, int Q, int Words>
struct WeightBuffer {
  static_assert(Q % 2 == 0, "a bank has two ports");
  static constexpr int kBanks = Q / 2;
  static constexpr int kVectors = kBanks * Words;
  IndexVector<G, T> bank[kBanks][Words];

  void put(int address, const IndexVector<G, T>& vector) { bank[address % kBanks][address / kBanks] = vector; }
  const IndexVector<G, T>& get(int address) const { return bank[address % kBanks][address / kBanks]; }
};

// A beat of the weight stream, as bytes of its little-endian bits.
template <int Bits>
struct WeightBeat {
  ap_uint<8> byte[Bits / 8];
  int bit(int i) const { return static_cast<int>((static_cast<Wide>(byte[i / 8]) >> (i % 8)) & 1); }
  int bits(int low, int count) const {
    int value = 0;
    for (int i = 0; i < count; ++i) value |= bit(low + i) << i;
    return value;
  }
};

// Fills the buffer with `vectors` index vectors and hands out the `norms` norm weights between them.
template <int G, int T, int Q, int Words, int Bits>
void wbmu_load(hls::stream<WeightBeat<Bits>>& in, WeightBuffer<G, T, Q, Words>& buffer, hls::stream<Half>& norm,
               int vectors, int norms, StatusWord& status) {
  using Vector = IndexVector<G, T>;
  constexpr int kPerBeat = (Bits - 16) / Vector::kWidth;
  static_assert(kPerBeat >= 1, "a beat holds at least one vector and a norm weight");
  raise(status, kBadDescriptor, vectors > buffer.kVectors);
  if (vectors > buffer.kVectors) return;
  const int needed = beats_for(vectors, kPerBeat);
  for (int beat = 0; beat < (needed > norms ? needed : norms); ++beat) {
#pragma HLS pipeline II = kPerBeat
    const WeightBeat<Bits> got = in.read();
    for (int i = 0; i < kPerBeat; ++i) {
      const int address = beat * kPerBeat + i;
      if (address >= vectors) break;
      Vector vector;
      for (int t = 0; t < T; ++t) {
#pragma HLS unroll
        vector.at[t] = got.bits(i * Vector::kWidth + t * Vector::kBits, Vector::kBits);
        raise(status, kBadIndex, vector.at[t] >= Vector::kCodes);
      }
      buffer.put(address, vector);
    }
    if (beat < norms) norm.write(got.bits(kPerBeat * Vector::kWidth, 16));
  }
}

// The 3^G sums of one group; entries that no index stands for are 0.
template <int G>
struct Table {
  static constexpr int kCodes = power_of_three(G);
  // 128 G of either sign: at G = 2 and 4 one bit more than 8 + ceil(log2 G), which -128 times -1 overflows.
  using Entry = ap_int<1 + bits_for(128 * G + 1)>;
  Entry entry[1 << bits_for(kCodes)];

  void fill(const ap_int<8>* x) {
    for (int code = 0; code < (1 << bits_for(kCodes)); ++code) {
#pragma HLS unroll
      int sum = 0, rest = code;
      for (int g = 0; g < G; ++g, rest /= 3) sum += (rest % 3 - 1) * static_cast<int>(x[g]);
      entry[code] = code < kCodes ? sum : 0;
    }
  }
};

template <int G, int T, int Q, int MaxOutputs>
struct TlmmBuffers {
  Table<G> table[T];
  ap_int<32> sum[(MaxOutputs + Q - 1) / Q][Q];
};

// One row after the other through the matrix in the buffer. Activations come in beats of T G, accumulators leave in beats
// of L; the padded outputs of the last step are not sent.
template <int G, int T, int Q, int L, int Words, int MaxOutputs>
void tlmm(hls::stream<Beat<ap_int<8>, T * G>>& x, const WeightBuffer<G, T, Q, Words>& buffer,
          TlmmBuffers<G, T, Q, MaxOutputs>& own, hls::stream<Beat<ap_int<32>, L>>& out, int inputs, int outputs,
          int rows, StatusWord& status) {
  const int blocks = beats_for(inputs, T * G), steps = beats_for(outputs, Q);
  const bool fits = outputs <= MaxOutputs && blocks * steps * Q <= buffer.kVectors;
  raise(status, kBadDescriptor, !fits);
  if (!fits) return;
  for (int row = 0; row < rows; ++row) {
    RowReader<ap_int<8>, T * G> reader(x, blocks, status);
    for (int block = 0; block < blocks; ++block) {
      const auto activations = reader.next();
      for (int t = 0; t < T; ++t) {
#pragma HLS unroll
        own.table[t].fill(activations.at + t * G);
      }
      for (int step = 0; step < steps; ++step) {
// Each step adds to other outputs, so no iteration waits for another.
#pragma HLS pipeline II = 1
#pragma HLS dependence variable = own.sum inter false
        for (int lane = 0; lane < Q; ++lane) {
#pragma HLS unroll
          const IndexVector<G, T>& vector = buffer.get((block * steps + step) * Q + lane);
          int partial = 0;
          for (int t = 0; t < T; ++t) {
#pragma HLS unroll
            partial += static_cast<int>(own.table[t].entry[static_cast<int>(vector.at[t])]);
          }
          own.sum[step][lane] = (block == 0 ? 0 : static_cast<Wide>(own.sum[step][lane])) + partial;
        }
      }
    }
    const int beats = beats_for(outputs, L);
    for (int beat = 0; beat < beats; ++beat) {
#pragma HLS pipeline II = 1
      Beat<ap_int<32>, L> made;
      for (int i = 0; i < L; ++i) {
        const int output = beat * L + i;
        made.at[i] = output < outputs ? own.sum[output / Q][output % Q] : ap_int<32>(0);
      }
      made.last = beat == beats - 1;
      out.write(made);
    }
  }
}

}  // namespace tilewright_hls
