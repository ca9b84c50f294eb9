// SPDX-License-Identifier: Apache-2.0
// The element-wise units; docs/reference/accelerator-contract.md, "Units". Python: edge/contract/rows.py.
#pragma once

#include "tilewright_hls/frames.h"

namespace tilewright_hls {

template <int L>
Magnitude largest_of(const HalfBeat<L>& beat, Magnitude before, StatusWord& status) {
#pragma HLS inline
  Wide largest = before;
  for (int i = 0; i < L; ++i) {
#pragma HLS unroll
    const Wide here = magnitude_of(beat.at[i], status);
    if (here > largest) largest = here;
  }
  return largest;
}

// Lanes beyond the row's width count as zeros whatever they hold.
template <class T, int L>
void mask_tail(Beat<T, L>& beat, int first, int width) {
#pragma HLS inline
  for (int i = 0; i < L; ++i) {
#pragma HLS unroll
    if (first + i >= width) beat.at[i] = T(0);
  }
}

struct InverseRoot {
  ap_uint<17> value;
  ap_int<9> half_exponent;
};

inline InverseRoot inverse_root(ap_uint<49> total, ap_uint<15> width) {
  int k = 32 + bit_length(total) - bit_length(width) - 1;
  k += k & 1;
  // Two candidates: compare width * 2^k with total * 2^32 after taking out the common power of two.
  const int shift = k - 32;
  const Wide left = shift > 0 ? static_cast<Wide>(width) << shift : static_cast<Wide>(width);
  const Wide right = shift < 0 ? static_cast<Wide>(total) << -shift : static_cast<Wide>(total);
  if (left < right) k += 2;
  return {root(divide(width, total, 15, k)), k / 2};
}

// Passes over a row: in (largest exponent), sum of squares, normed values out with their maximum behind them.
// `out` must hold a whole row, since the quantizer waits for `largest`.
template <int L, int MaxWidth>
void rms_max(hls::stream<HalfBeat<L>>& in, const Half* weight, int width, ap_uint<47> eps, bool norm,
             hls::stream<HalfBeat<L>>& out, hls::stream<Magnitude>& largest, int rows, StatusWord& status) {
  const int beats = beats_for(width, L);
  raise(status, kBadDescriptor, width > MaxWidth || width < 1);
  if (width > MaxWidth || width < 1) return;
  for (int row = 0; row < rows; ++row) {
    static thread_local HalfBeat<L> held[(MaxWidth + L - 1) / L];
    RowReader<Half, L> reader(in, beats, status);
    Wide top = kNormFloor;
    for (int beat = 0; beat < beats; ++beat) {
#pragma HLS pipeline II = 1
      held[beat] = reader.next();
      mask_tail(held[beat], beat * L, width);
      for (int i = 0; i < L; ++i) {
        const Split x = split(held[beat].at[i], status);
        if (x.exponent > top) top = x.exponent;
      }
    }
    ap_uint<49> total = static_cast<Wide>(eps) >> (2 * (top - kNormFloor));
    for (int beat = 0; beat < beats && norm; ++beat) {
#pragma HLS pipeline II = 1
      for (int i = 0; i < L; ++i) {
        const ap_int<18> a = aligned<17>(split(held[beat].at[i], status), top);
        total = static_cast<Wide>(total) + static_cast<Wide>(a) * static_cast<Wide>(a);
      }
    }
    const InverseRoot r = inverse_root(total > 0 ? total : ap_uint<49>(1), width);
    Magnitude most = 0;
    for (int beat = 0; beat < beats; ++beat) {
#pragma HLS pipeline II = 1
      HalfBeat<L> made = held[beat];
      for (int i = 0; i < L && norm; ++i) {
#pragma HLS unroll
        if (beat * L + i >= width) break;
        const Split x = split(held[beat].at[i], status), w = split(weight[beat * L + i], status);
        const ap_int<40> product = x.value() * w.value() * static_cast<Wide>(r.value);
        made.at[i] = pack(product, x.exponent + w.exponent + 6 - top - r.half_exponent, status);
      }
      most = largest_of(made, most, status);
      made.last = beat == beats - 1;
      out.write(made);
    }
    largest.write(most);
  }
}

// Waits for a row's maximum, then quantizes the row that lies ready.
template <int L>
void quant(hls::stream<HalfBeat<L>>& in, hls::stream<Magnitude>& largest, hls::stream<Beat<ap_int<8>, L>>& out,
           hls::stream<Magnitude>& scale, int width, int rows, StatusWord& status) {
  for (int row = 0; row < rows; ++row) {
    const Magnitude most = largest.read();
    const Magnitude s = most > kMinScaleBits ? most : Magnitude(kMinScaleBits);
    scale.write(s);
    const Split ss = split_magnitude(s);
    const ap_uint<24> reciprocal = divide((Wide{127} << 24) + ss.mantissa - 1, ss.mantissa, 31);
    RowReader<Half, L> reader(in, beats_for(width, L), status);
    for (int beat = 0; beat < beats_for(width, L); ++beat) {
#pragma HLS pipeline II = 1
      HalfBeat<L> got = reader.next();
      mask_tail(got, beat * L, width);
      Beat<ap_int<8>, L> made;
      for (int i = 0; i < L; ++i) {
#pragma HLS unroll
        const Magnitude bits = magnitude_of(got.at[i], status);
        const Split x = split_magnitude(bits);
        const ap_uint<35> product = static_cast<Wide>(x.mantissa) * static_cast<Wide>(reciprocal);
        Wide q = 127;
        if (bits <= s) q = shift_right_even(static_cast<Wide>(product) >> 11, 13 + ss.exponent - x.exponent);
        raise(status, kQuantClamp, bits > s);
        made.at[i] = (static_cast<Wide>(got.at[i]) >> 15) ? -q : q;
      }
      made.last = beat == beats_for(width, L) - 1;
      out.write(made);
    }
  }
}

enum class Fuse { kBypass = 0, kResidual = 1, kRope = 2, kSilu = 3, kSquaredRelu = 4 };

inline ap_uint<17> sigmoid(const Split& x) {
#pragma HLS inline
  const Wide shift = x.exponent + 14;
  Wide z = shift >= 0 ? static_cast<Wide>(x.mantissa) << shift : shift_down(x.mantissa, -shift);
  if (z > (1 << 18) - 1) z = (1 << 18) - 1;
  const int index = static_cast<int>(z >> 9);
  const Wide rest = z & 511;
  const Wide positive = kSigmoid[index] + ((kSigmoid[index + 1] - kSigmoid[index]) * rest >> 9);
  return x.negative ? (Wide{1} << 16) - positive : positive;
}

// What leaves for one dequantized value and its partner of the side stream: a residual, or for a gated map the gate.
inline Half fuse_one(Fuse mode, Half y, Half side, StatusWord& status) {
#pragma HLS inline
  const Split a = split(y, status), b = split(side, status);
  if (mode == Fuse::kResidual) {
    const Wide low = a.exponent < b.exponent ? a.exponent : b.exponent;
    return pack((a.value() << (a.exponent - low)) + (b.value() << (b.exponent - low)), low, status);
  }
  if (mode == Fuse::kSilu) {
    const ap_int<40> product = b.value() * a.value() * static_cast<Wide>(sigmoid(b));
    return pack(product, b.exponent + a.exponent - 16, status);
  }
  const Wide gate = b.negative ? 0 : b.value();
  return pack(gate * gate * a.value(), 2 * b.exponent + a.exponent, status);
}

// Cosine and sine of L / 2 pairs, times 2^14.
template <int L>
struct AngleBeat {
  ap_int<16> cosine[L / 2], sine[L / 2];
};

template <int L>
HalfBeat<L> rotate(const HalfBeat<L>& x, const AngleBeat<L>& angle, StatusWord& status) {
#pragma HLS inline
  HalfBeat<L> out = x;
  for (int i = 0; i < L / 2; ++i) {
#pragma HLS unroll
    const Split first = split(x.at[2 * i], status), second = split(x.at[2 * i + 1], status);
    const Wide top = first.exponent > second.exponent ? first.exponent : second.exponent;
    const ap_int<27> a = aligned<26>(first, top), b = aligned<26>(second, top);
    const Wide c = angle.cosine[i], s = angle.sine[i];
    out.at[2 * i] = pack(static_cast<Wide>(a) * c - static_cast<Wide>(b) * s, top - 29, status);
    out.at[2 * i + 1] = pack(static_cast<Wide>(b) * c + static_cast<Wide>(a) * s, top - 29, status);
  }
  return out;
}

inline Half dequantized(ap_int<32> acc, const Factor& factor, StatusWord& status) {
#pragma HLS inline
  constexpr Wide kLimit = (Wide{1} << 26) - 1;
  Wide clamped = acc;
  raise(status, kAccClamp, clamped > kLimit || clamped < -kLimit);
  clamped = clamped > kLimit ? kLimit : clamped < -kLimit ? -kLimit : clamped;
  const ap_int<44> product = clamped * static_cast<Wide>(factor.mantissa);
  return pack(product, factor.exponent, status);
}

// Accumulators of a row to float16 and through one of the fuse modes. `side` holds the residual or the gate of a row,
// `angles` what RoPE needs, head after head; each is read in its modes only.
template <int L>
void dequant_fuse(hls::stream<Beat<ap_int<32>, L>>& in, hls::stream<Magnitude>& scale, Factor weight_scale, Fuse mode,
                  hls::stream<HalfBeat<L>>& side, hls::stream<AngleBeat<L>>& angles, hls::stream<HalfBeat<L>>& out,
                  int width, int rows, StatusWord& status) {
  const int beats = beats_for(width, L);
  const bool sided = mode != Fuse::kBypass && mode != Fuse::kRope;
  for (int row = 0; row < rows; ++row) {
    const Split s = split_magnitude(scale.read());
    const Factor factor = normal(static_cast<Wide>(s.mantissa) * static_cast<Wide>(weight_scale.mantissa),
                                 s.exponent + weight_scale.exponent);
    RowReader<ap_int<32>, L> reader(in, beats, status);
    RowReader<Half, L> partners(side, beats, status);
    for (int beat = 0; beat < beats; ++beat) {
#pragma HLS pipeline II = 1
      Beat<ap_int<32>, L> got = reader.next();
      mask_tail(got, beat * L, width);
      HalfBeat<L> made;
      for (int i = 0; i < L; ++i) {
#pragma HLS unroll
        made.at[i] = dequantized(got.at[i], factor, status);
      }
      if (sided) {
        HalfBeat<L> partner = partners.next();
        mask_tail(partner, beat * L, width);
        for (int i = 0; i < L; ++i) {
#pragma HLS unroll
          made.at[i] = fuse_one(mode, made.at[i], partner.at[i], status);
        }
      } else if (mode == Fuse::kRope) {
        made = rotate(made, angles.read(), status);
      }
      made.last = beat == beats - 1;
      out.write(made);
    }
  }
}

}  // namespace tilewright_hls
