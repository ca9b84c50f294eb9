// SPDX-License-Identifier: Apache-2.0
#include "tops.h"

using namespace tilewright_hls;
using namespace tilewright_hls::build;

namespace {

RpaBuffers<P, kMaxWidth, kMaxHeads> prefill;
DaBuffers<kMaxWidth, kMaxHeads, kMaxContext> decode;

}  // namespace

extern "C" void tw_rpa(hls::stream<HalfBeat<16>>& q, const Half* keys, const Half* values, int capacity,
                       hls::stream<HalfBeat<16>>& out, AttentionShape shape, int tokens, StatusWord& status) {
#pragma HLS interface axis port = q
#pragma HLS interface m_axi port = keys offset = slave bundle = keys max_read_burst_length = 16
#pragma HLS interface m_axi port = values offset = slave bundle = values max_read_burst_length = 16
#pragma HLS interface axis port = out
  Traffic traffic;
  rpa<P, L, kMaxWidth, kMaxHeads>(q, {keys, values, capacity}, prefill, out, shape, tokens, traffic, status);
}

extern "C" void tw_da(hls::stream<HalfBeat<16>>& q, const Half* keys, const Half* values, int capacity,
                      hls::stream<HalfBeat<16>>& out, AttentionShape shape, int keys_count, StatusWord& status) {
#pragma HLS interface axis port = q
#pragma HLS interface m_axi port = keys offset = slave bundle = keys max_read_burst_length = 16
#pragma HLS interface m_axi port = values offset = slave bundle = values max_read_burst_length = 16
#pragma HLS interface axis port = out
  Traffic traffic;
  da<L, kMaxWidth, kMaxHeads, kMaxContext>(q, {keys, values, capacity}, decode, out, shape, keys_count, traffic,
                                           status);
}
