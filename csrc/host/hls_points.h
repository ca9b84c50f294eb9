// SPDX-License-Identifier: Apache-2.0
// Units that depend on a build's parameters, one instantiation a point.
#pragma once

#include <memory>

#include "host/hls_arrays.h"
#include "tilewright_hls/rows.h"
#include "tilewright_hls/softmax.h"
#include "tilewright_hls/tlmm.h"

namespace tilewright::hls_sim {

struct LinearCall {
  Array<uint8_t> beats;
  int inputs, outputs, norms;
};

// How a dataflow region is simulated: the depth of its streams and of the one that holds a normed row, and the order in
// which processes run.
struct NetworkCall {
  int depth, row_depth;
  uint64_t seed;
};

template <int G_, int T_, int Q_, int P_, int Words_, int MaxOutputs_, int Bits_>
struct Point {
  static constexpr int G = G_, T = T_, Q = Q_, P = P_, Words = Words_, MaxOutputs = MaxOutputs_, Bits = Bits_;
  static constexpr int kMaxWidth = 2048, kMaxHeads = 32;
  using Buffer = WeightBuffer<G, T, Q, Words>;
  using Own = TlmmBuffers<G, T, Q, MaxOutputs>;

  static int vectors(const LinearCall& call) { return beats_for(call.inputs, T * G) * beats_for(call.outputs, Q) * Q; }

  static void feed(const Array<uint8_t>& beats, hls::stream<WeightBeat<Bits>>& out) {
    require(beats.ndim() == 2 && beats.shape(1) == Bits / 8, "beats: needed [count, ", Bits / 8, "] bytes");
    for (py::ssize_t row = 0; row < beats.shape(0); ++row) {
      WeightBeat<Bits> beat;
      for (int i = 0; i < Bits / 8; ++i) beat.byte[i] = beats.at(row, i);
      out.write(beat);
    }
  }

  static std::unique_ptr<Buffer> loaded(const LinearCall& call, hls::stream<Half>& norm, StatusWord& status) {
    auto buffer = std::make_unique<Buffer>();
    hls::stream<WeightBeat<Bits>> in("weights");
    feed(call.beats, in);
    wbmu_load<G, T, Q, Words, Bits>(in, *buffer, norm, vectors(call), call.norms, status);
    in.expect_empty();
    return buffer;
  }

  // (indices [vectors, T] in the order of their addresses, norm weights, status)
  static py::tuple load(const LinearCall& call) {
    StatusWord status = 0;
    hls::stream<Half> norm("norm");
    const auto buffer = loaded(call, norm, status);
    py::array_t<uint8_t> indices({vectors(call), T});
    for (int v = 0; v < vectors(call); ++v) {
      for (int t = 0; t < T; ++t) indices.mutable_at(v, t) = static_cast<uint8_t>(buffer->get(v).at[t]);
    }
    return py::make_tuple(indices, read_values<uint16_t>(norm, call.norms), as_int(status));
  }

  // (int32 [rows, outputs], status)
  static py::tuple multiply(const Array<int8_t>& x, const LinearCall& call) {
    StatusWord status = 0;
    hls::stream<Half> norm("norm");
    const auto buffer = loaded(call, norm, status);
    const int rows = rows_of(x, "x");
    require(x.shape(1) == call.inputs, "x: got ", x.shape(1), " columns, needed ", call.inputs);
    hls::stream<Beat<ap_int<8>, kLanes>> narrow("quantized");
    hls::stream<Beat<ap_int<8>, T * G>> wide("activations");
    hls::stream<Beat<ap_int<32>, kLanes>> out("accumulators");
    write_rows<ap_int<8>>(x, narrow, 77);
    auto own = std::make_unique<Own>();
    {
      py::gil_scoped_release release;
      gearbox<ap_int<8>, kLanes, T * G>(narrow, wide, call.inputs, rows, status);
      tlmm<G, T, Q, kLanes, Words, MaxOutputs>(wide, *buffer, *own, out, call.inputs, call.outputs, rows, status);
      narrow.expect_empty();
      wide.expect_empty();
    }
    return py::make_tuple(read_rows<int32_t>(out, rows, call.outputs), as_int(status));
  }

  // Norm, quantizer, gearbox, TLMM and dequantizer as one dataflow region with bounded streams.
  // (float16 bits [rows, outputs], status, most items by stream)
  static py::tuple linear(const Array<uint16_t>& x, const LinearCall& call, uint64_t eps, const Factor& factor,
                          const NetworkCall& how) {
    StatusWord status = 0;
    const int rows = rows_of(x, "x"), width = call.inputs;
    hls::stream<Half> norm_stream("norm");
    const auto buffer = loaded(call, norm_stream, status);
    std::vector<Half> norm(static_cast<size_t>(call.norms));
    for (Half& weight : norm) weight = norm_stream.read();
    const size_t depth = static_cast<size_t>(how.depth);
    hls::stream<HalfBeat<kLanes>> in("row", kUnlimited), normed("normed", static_cast<size_t>(how.row_depth)),
        out("out", kUnlimited), side("side", depth);
    hls::stream<Magnitude> largest("largest", depth), scale("scale", depth);
    hls::stream<Beat<ap_int<8>, kLanes>> narrow("quantized", depth);
    hls::stream<Beat<ap_int<8>, T * G>> wide("activations", depth);
    hls::stream<Beat<ap_int<32>, kLanes>> sums("accumulators", depth);
    hls::stream<AngleBeat<kLanes>> angles("angles", depth);
    write_rows<Half>(x, in);
    auto own = std::make_unique<Own>();
    Network network(how.seed);
    const bool has_norm = call.norms > 0;
    // Each process has a status of its own, as in hardware; they are joined at the end.
    StatusWord own_status[5] = {};
    network.add("rms_max", [&] {
      rms_max<kLanes, 16384>(in, norm.data(), width, static_cast<long long>(eps), has_norm, normed, largest, rows,
                             own_status[0]);
    });
    network.add("quant", [&] { quant<kLanes>(normed, largest, narrow, scale, width, rows, own_status[1]); });
    network.add("gearbox", [&] { gearbox<ap_int<8>, kLanes, T * G>(narrow, wide, width, rows, own_status[2]); });
    network.add("tlmm", [&] {
      tlmm<G, T, Q, kLanes, Words, MaxOutputs>(wide, *buffer, *own, sums, width, call.outputs, rows, own_status[3]);
    });
    network.add("dequant", [&] {
      dequant_fuse<kLanes>(sums, scale, factor, Fuse::kBypass, side, angles, out, call.outputs, rows, own_status[4]);
    });
    {
      py::gil_scoped_release release;
      network.run();
    }
    for (const StatusWord& one : own_status) status = static_cast<long long>(status) | static_cast<long long>(one);
    py::dict most;
    most["normed"] = normed.most();
    most["largest"] = largest.most();
    most["scale"] = scale.most();
    most["quantized"] = narrow.most();
    most["activations"] = wide.most();
    most["accumulators"] = sums.most();
    return py::make_tuple(read_rows<uint16_t>(out, rows, call.outputs), as_int(status), most);
  }

  // Attention of the newest `tokens` of all keys: as a prompt (rpa, when `first` is 0) or one by one (da).
  // (float16 bits [tokens, width], status, (key rows read, value rows read))
  static py::tuple attend(const Array<uint16_t>& q, const Array<uint16_t>& keys, const Array<uint16_t>& values,
                          const AttentionShape& shape, int first, bool prefill) {
    const int tokens = rows_of(q, "q"), count = rows_of(keys, "keys");
    require(q.shape(1) == shape.width() && keys.shape(1) == shape.kv_width() && values.shape(1) == shape.kv_width() &&
                values.shape(0) == count && count == first + tokens && (!prefill || first == 0),
            "attention: shapes do not fit together");
    // As in external memory: the newest position first.
    std::vector<Half> k(static_cast<size_t>(keys.size())), v(static_cast<size_t>(values.size()));
    for (int t = 0; t < count; ++t) {
      for (int i = 0; i < shape.kv_width(); ++i) {
        const size_t at =
            static_cast<size_t>(count - 1 - t) * static_cast<size_t>(shape.kv_width()) + static_cast<size_t>(i);
        k[at] = keys.at(t, i);
        v[at] = values.at(t, i);
      }
    }
    const CachePort cache{k.data(), v.data(), count};
    StatusWord status = 0;
    Traffic traffic;
    hls::stream<HalfBeat<kLanes>> in("q"), out("out");
    for (int token = tokens - 1; token >= 0; --token) write_token(q, token, in);
    {
      py::gil_scoped_release release;
      if (prefill) {
        auto own = std::make_unique<RpaBuffers<P, kMaxWidth, kMaxHeads>>();
        rpa<P, kLanes, kMaxWidth, kMaxHeads>(in, cache, *own, out, shape, tokens, traffic, status);
      } else {
        auto own = std::make_unique<DaBuffers<kMaxWidth, kMaxHeads, kMaxContext>>();
        for (int token = tokens - 1; token >= 0; --token) {
          da<kLanes, kMaxWidth, kMaxHeads, kMaxContext>(in, cache, *own, out, shape, first + token + 1, traffic,
                                                        status);
        }
      }
    }
    in.expect_empty();
    const py::array_t<uint16_t> newest_first = read_rows<uint16_t>(out, tokens, shape.width());
    py::array_t<uint16_t> result({tokens, shape.width()});
    for (int token = 0; token < tokens; ++token) {
      for (int i = 0; i < shape.width(); ++i) result.mutable_at(token, i) = newest_first.at(tokens - 1 - token, i);
    }
    return py::make_tuple(result, as_int(status), py::make_tuple(traffic.key_rows, traffic.value_rows));
  }

 private:
  static void write_token(const Array<uint16_t>& q, int token, hls::stream<HalfBeat<kLanes>>& out) {
    const int width = static_cast<int>(q.shape(1));
    for (int beat = 0; beat < beats_for(width, kLanes); ++beat) {
      HalfBeat<kLanes> made;
      for (int i = 0; i < kLanes && beat * kLanes + i < width; ++i) made.at[i] = q.at(token, beat * kLanes + i);
      made.last = beat == beats_for(width, kLanes) - 1;
      out.write(made);
    }
  }
};

}  // namespace tilewright::hls_sim
