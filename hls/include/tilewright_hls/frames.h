// SPDX-License-Identifier: Apache-2.0
// Beats of a row, and reading a row whose length the sender may have got wrong.
#pragma once

#include "tilewright_hls/half.h"
#include "tilewright_hls/stream.h"

namespace tilewright_hls {

// L values of a row; `last` ends the row.
template <class T, int L>
struct Beat {
  T at[L];
  bool last = false;
};

template <int L>
using HalfBeat = Beat<Half, L>;

constexpr int beats_for(int values, int lanes) { return (values + lanes - 1) / lanes; }

// Reads the beats of one row of a known length. A row that ends early goes on as zeros, a row that goes on too long is
// read to its end and dropped; each sets its status bit, and the unit behind never hangs.
template <class T, int L>
class RowReader {
 public:
  RowReader(hls::stream<Beat<T, L>>& in, int beats, StatusWord& status) : in_(in), left_(beats), status_(status) {}

  Beat<T, L> next() {
#pragma HLS inline
    --left_;
    if (ended_) return {};
    const Beat<T, L> beat = in_.read();
    ended_ = beat.last;
    raise(status_, kShortFrame, ended_ && left_ > 0);
    if (left_ == 0) finish();
    return beat;
  }

 private:
  void finish() {
    while (!ended_) {
#pragma HLS pipeline II = 1
      raise(status_, kLongFrame, true);
      ended_ = in_.read().last;
    }
  }

  hls::stream<Beat<T, L>>& in_;
  int left_;
  StatusWord& status_;
  bool ended_ = false;
};

// From rows of beats of A values to rows of beats of B values, of the same `values`; what is left of the last is zero.
// The widths need not divide each other: a residue of fewer than A + B values is kept.
template <class T, int A, int B>
void gearbox(hls::stream<Beat<T, A>>& in, hls::stream<Beat<T, B>>& out, int values, int rows, StatusWord& status) {
  for (int row = 0; row < rows; ++row) {
    RowReader<T, A> reader(in, beats_for(values, A), status);
    T held[A + B] = {};
#pragma HLS array_partition variable = held complete
    int have = 0, taken = 0;
    for (int beat = 0; beat < beats_for(values, B); ++beat) {
      while (have < B && taken < values) {
#pragma HLS pipeline II = 1
        const Beat<T, A> got = reader.next();
        for (int i = 0; i < A; ++i) {
#pragma HLS unroll
          held[have + i] = taken + i < values ? got.at[i] : T(0);
        }
        have += A;
        taken += A;
      }
      Beat<T, B> made;
      for (int i = 0; i < B; ++i) made.at[i] = i < have ? held[i] : T(0);
      for (int i = 0; i < A; ++i) held[i] = B + i < have ? held[B + i] : T(0);
      have = have > B ? have - B : 0;
      made.last = beat == beats_for(values, B) - 1;
      out.write(made);
    }
  }
}

}  // namespace tilewright_hls
