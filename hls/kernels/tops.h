// SPDX-License-Identifier: Apache-2.0
// The build of the paper: G = 3, T = 28, Q = 16, P = 4, 16 values a beat. One top a unit.
#pragma once

#include "tilewright_hls/rows.h"
#include "tilewright_hls/softmax.h"
#include "tilewright_hls/tlmm.h"

namespace tilewright_hls::build {

inline constexpr int G = 3, T = 28, Q = 16, P = 4, L = 16;
inline constexpr int kWords = 3 * 4096;  // three URAMs deep
inline constexpr int kMaxOutputs = 8192, kMaxWidth = 4096, kMaxHeads = 32, kBeatBits = 768;

using Buffer = WeightBuffer<G, T, Q, kWords>;

}  // namespace tilewright_hls::build

extern "C" {
void tw_wbmu_load(hls::stream<tilewright_hls::WeightBeat<768>>& in, hls::stream<tilewright_hls::Half>& norm,
                  int vectors, int norms, tilewright_hls::StatusWord& status);
void tw_tlmm(hls::stream<tilewright_hls::Beat<ap_int<8>, 84>>& x,
             hls::stream<tilewright_hls::Beat<ap_int<32>, 16>>& out, int inputs, int outputs, int rows,
             tilewright_hls::StatusWord& status);
void tw_rms_max(hls::stream<tilewright_hls::HalfBeat<16>>& in, const tilewright_hls::Half* weight, int width,
                ap_uint<47> eps, bool norm, hls::stream<tilewright_hls::HalfBeat<16>>& out,
                hls::stream<tilewright_hls::Magnitude>& largest, int rows, tilewright_hls::StatusWord& status);
void tw_quant(hls::stream<tilewright_hls::HalfBeat<16>>& in, hls::stream<tilewright_hls::Magnitude>& largest,
              hls::stream<tilewright_hls::Beat<ap_int<8>, 84>>& out, hls::stream<tilewright_hls::Magnitude>& scale,
              int width, int rows, tilewright_hls::StatusWord& status);
void tw_dequant_fuse(hls::stream<tilewright_hls::Beat<ap_int<32>, 16>>& in,
                     hls::stream<tilewright_hls::Magnitude>& scale, tilewright_hls::Factor weight_scale, int mode,
                     hls::stream<tilewright_hls::HalfBeat<16>>& side,
                     hls::stream<tilewright_hls::AngleBeat<16>>& angles, hls::stream<tilewright_hls::HalfBeat<16>>& out,
                     int width, int rows, tilewright_hls::StatusWord& status);
void tw_rpa(hls::stream<tilewright_hls::HalfBeat<16>>& q, const tilewright_hls::Half* keys,
            const tilewright_hls::Half* values, int capacity, hls::stream<tilewright_hls::HalfBeat<16>>& out,
            tilewright_hls::AttentionShape shape, int tokens, tilewright_hls::StatusWord& status);
void tw_da(hls::stream<tilewright_hls::HalfBeat<16>>& q, const tilewright_hls::Half* keys,
           const tilewright_hls::Half* values, int capacity, hls::stream<tilewright_hls::HalfBeat<16>>& out,
           tilewright_hls::AttentionShape shape, int keys_count, tilewright_hls::StatusWord& status);
}
