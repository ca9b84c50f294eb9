// SPDX-License-Identifier: Apache-2.0
#include "tops.h"

using namespace tilewright_hls;
using namespace tilewright_hls::build;

extern "C" void tw_rms_max(hls::stream<HalfBeat<16>>& in, const Half* weight, int width, ap_uint<47> eps, bool norm,
                           hls::stream<HalfBeat<16>>& out, hls::stream<Magnitude>& largest, int rows,
                           StatusWord& status) {
#pragma HLS interface axis port = in
#pragma HLS interface bram port = weight
#pragma HLS interface axis port = out
#pragma HLS interface axis port = largest
  rms_max<L, kMaxWidth>(in, weight, width, eps, norm, out, largest, rows, status);
}

extern "C" void tw_quant(hls::stream<HalfBeat<16>>& in, hls::stream<Magnitude>& largest,
                         hls::stream<Beat<ap_int<8>, 84>>& out, hls::stream<Magnitude>& scale, int width, int rows,
                         StatusWord& status) {
#pragma HLS interface axis port = in
#pragma HLS interface axis port = largest
#pragma HLS interface axis port = out
#pragma HLS interface axis port = scale
#pragma HLS dataflow
  hls::stream<Beat<ap_int<8>, L>> narrow("quantized");
#pragma HLS stream variable = narrow depth = 2
  quant<L>(in, largest, narrow, scale, width, rows, status);
  gearbox<ap_int<8>, L, T * G>(narrow, out, width, rows, status);
}

extern "C" void tw_dequant_fuse(hls::stream<Beat<ap_int<32>, 16>>& in, hls::stream<Magnitude>& scale,
                                Factor weight_scale, int mode, hls::stream<HalfBeat<16>>& side,
                                hls::stream<AngleBeat<16>>& angles, hls::stream<HalfBeat<16>>& out, int width, int rows,
                                StatusWord& status) {
#pragma HLS interface axis port = in
#pragma HLS interface axis port = scale
#pragma HLS interface axis port = side
#pragma HLS interface axis port = angles
#pragma HLS interface axis port = out
  dequant_fuse<L>(in, scale, weight_scale, static_cast<Fuse>(mode), side, angles, out, width, rows, status);
}
