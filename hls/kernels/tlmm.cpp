// SPDX-License-Identifier: Apache-2.0
// The loader and the product share the weight buffer, so they are two tops of one source.
#include "tops.h"

using namespace tilewright_hls;
using namespace tilewright_hls::build;

namespace {

Buffer buffer;
TlmmBuffers<G, T, Q, kMaxOutputs> own;

}  // namespace

extern "C" void tw_wbmu_load(hls::stream<WeightBeat<768>>& in, hls::stream<Half>& norm, int vectors, int norms,
                             StatusWord& status) {
#pragma HLS interface axis port = in
#pragma HLS interface axis port = norm
#pragma HLS interface s_axilite port = vectors
#pragma HLS interface s_axilite port = norms
#pragma HLS bind_storage variable = buffer.bank type = ram_t2p impl = uram
#pragma HLS array_partition variable = buffer.bank dim = 1 complete
  wbmu_load<G, T, Q, kWords, kBeatBits>(in, buffer, norm, vectors, norms, status);
}

extern "C" void tw_tlmm(hls::stream<Beat<ap_int<8>, 84>>& x, hls::stream<Beat<ap_int<32>, 16>>& out, int inputs,
                        int outputs, int rows, StatusWord& status) {
#pragma HLS interface axis port = x
#pragma HLS interface axis port = out
#pragma HLS interface s_axilite port = inputs
#pragma HLS interface s_axilite port = outputs
#pragma HLS interface s_axilite port = rows
#pragma HLS bind_storage variable = own.table type = ram_1wnr impl = lutram
#pragma HLS array_partition variable = own.table dim = 1 complete
#pragma HLS array_partition variable = own.sum dim = 2 complete
  tlmm<G, T, Q, L, kWords, kMaxOutputs>(x, buffer, own, out, inputs, outputs, rows, status);
}
