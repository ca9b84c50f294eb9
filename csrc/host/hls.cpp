// SPDX-License-Identifier: Apache-2.0
#include "host/hls.h"

#include <pybind11/stl.h>

#include "host/hls_points.h"

namespace tilewright {
namespace {

using namespace hls_sim;

// (y bits, largest bits, status); without a norm weight only the maximum is taken.
py::tuple rms_max_rows(const Array<uint16_t>& x, const std::optional<Array<uint16_t>>& weight, uint64_t eps) {
  const int rows = rows_of(x, "x"), width = static_cast<int>(x.shape(1));
  require(!weight || weight->size() == width, "weight: needed ", width, " values");
  std::vector<Half> norm(weight ? static_cast<size_t>(width) : 0);
  for (size_t i = 0; i < norm.size(); ++i) norm[i] = weight->data()[i];
  StatusWord status = 0;
  hls::stream<HalfBeat<kLanes>> in("row"), out("normed");
  hls::stream<Magnitude> largest("largest");
  write_rows<Half>(x, in, 0x7BFF);
  rms_max<kLanes, 16384>(in, norm.data(), width, static_cast<long long>(eps), weight.has_value(), out, largest, rows,
                         status);
  in.expect_empty();
  return py::make_tuple(read_rows<uint16_t>(out, rows, width), read_values<int64_t>(largest, rows), as_int(status));
}

py::tuple quantize_rows(const Array<uint16_t>& x, const Array<int64_t>& largest) {
  const int rows = rows_of(x, "x"), width = static_cast<int>(x.shape(1));
  require(largest.size() == rows, "largest: needed one a row");
  StatusWord status = 0;
  hls::stream<HalfBeat<kLanes>> in("normed");
  hls::stream<Magnitude> most("largest"), scale("scale");
  hls::stream<Beat<ap_int<8>, kLanes>> out("quantized");
  write_rows<Half>(x, in, 0x7BFF);
  for (int row = 0; row < rows; ++row) most.write(largest.data()[row]);
  quant<kLanes>(in, most, out, scale, width, rows, status);
  in.expect_empty();
  return py::make_tuple(read_rows<int8_t>(out, rows, width), read_values<int64_t>(scale, rows), as_int(status));
}

// Angles are int16 [rows, width / 2, 2].
py::tuple dequant_rows(const Array<int32_t>& acc, const Array<int64_t>& scales, int mantissa, int exponent, int mode,
                       const std::optional<Array<uint16_t>>& side, const std::optional<Array<int16_t>>& angle) {
  const int rows = rows_of(acc, "acc"), width = static_cast<int>(acc.shape(1));
  const Fuse fuse = static_cast<Fuse>(mode);
  const bool sided = fuse != Fuse::kBypass && fuse != Fuse::kRope;
  require(mode >= 0 && mode <= 4 && scales.size() == rows && sided == side.has_value() &&
              (fuse == Fuse::kRope) == angle.has_value(),
          "dequant_fuse: mode ", mode, " does not go with what came with it");
  StatusWord status = 0;
  hls::stream<Beat<ap_int<32>, kLanes>> in("accumulators");
  hls::stream<Magnitude> scale("scale");
  hls::stream<HalfBeat<kLanes>> partners("side"), out("out");
  hls::stream<AngleBeat<kLanes>> angles("angles");
  write_rows<ap_int<32>>(acc, in, 12345);
  for (int row = 0; row < rows; ++row) scale.write(scales.data()[row]);
  if (side) write_rows<Half>(*side, partners, 0x7BFF);
  if (angle) {
    require(width % 2 == 0 && angle->size() == static_cast<py::ssize_t>(rows) * width,
            "angles: needed [rows, width / 2, 2]");
    for (int row = 0; row < rows; ++row) {
      for (int beat = 0; beat < beats_for(width, kLanes); ++beat) {
        AngleBeat<kLanes> made;
        for (int i = 0; i < kLanes / 2 && beat * kLanes + 2 * i < width; ++i) {
          const int16_t* pair = angle->data() + static_cast<long>(row) * width + beat * kLanes + 2 * i;
          made.cosine[i] = pair[0];
          made.sine[i] = pair[1];
        }
        angles.write(made);
      }
    }
  }
  dequant_fuse<kLanes>(in, scale, Factor{mantissa, exponent}, fuse, partners, angles, out, width, rows, status);
  in.expect_empty();
  partners.expect_empty();
  angles.expect_empty();
  return py::make_tuple(read_rows<uint16_t>(out, rows, width), as_int(status));
}

// Rows as streams of beats with frames as the caller draws them: to show what a unit does with broken ones.
py::tuple framed_quantize(const std::vector<std::vector<uint16_t>>& beats, const std::vector<bool>& last, int width,
                          int rows) {
  require(beats.size() == last.size(), "framed_quantize: needed a last flag for each beat");
  StatusWord status = 0;
  hls::stream<HalfBeat<kLanes>> in("normed");
  hls::stream<Magnitude> most("largest"), scale("scale");
  hls::stream<Beat<ap_int<8>, kLanes>> out("quantized");
  for (size_t b = 0; b < beats.size(); ++b) {
    HalfBeat<kLanes> beat;
    for (size_t i = 0; i < beats[b].size() && i < kLanes; ++i) beat.at[i] = beats[b][i];
    beat.last = last[b];
    in.write(beat);
  }
  for (int row = 0; row < rows; ++row) most.write(0x7BFF);
  quant<kLanes>(in, most, out, scale, width, rows, status);
  in.expect_empty();
  read_values<int64_t>(scale, rows);
  return py::make_tuple(read_rows<int8_t>(out, rows, width), as_int(status));
}

template <class P>
void bind_point(py::module_& m) {
  const std::string name = "Point" + std::to_string(P::G) + "_" + std::to_string(P::T) + "_" + std::to_string(P::Q) +
                           "_" + std::to_string(P::P);
  py::class_<P> point(m, name.c_str());
  point.attr("tiling") = py::make_tuple(P::G, P::T, P::Q, P::P);
  point.attr("beat_bits") = P::Bits;
  point.attr("buffer_vectors") = P::Buffer::kVectors;
  point.attr("max_outputs") = P::MaxOutputs;
  point.def_static("load", [](const Array<uint8_t>& beats, int inputs, int outputs, int norms) {
    return P::load({beats, inputs, outputs, norms});
  });
  point.def_static("tlmm", [](const Array<int8_t>& x, const Array<uint8_t>& beats, int inputs, int outputs, int norms) {
    return P::multiply(x, {beats, inputs, outputs, norms});
  });
  point.def_static(
      "linear", [](const Array<uint16_t>& x, const Array<uint8_t>& beats, int inputs, int outputs, int norms,
                   uint64_t eps, int mantissa, int exponent, int depth, int row_depth, uint64_t seed) {
        return P::linear(x, {beats, inputs, outputs, norms}, eps, Factor{mantissa, exponent}, {depth, row_depth, seed});
      });
  point.def_static("attention", [](const Array<uint16_t>& q, const Array<uint16_t>& k, const Array<uint16_t>& v,
                                   int heads, int kv_heads, int mantissa, int exponent, int first, bool prefill) {
    require(heads > 0 && kv_heads > 0 && q.ndim() == 2, "attention: no heads");
    const int size = static_cast<int>(q.shape(1)) / heads;
    return P::attend(q, k, v, {heads, kv_heads, size, Factor{mantissa, exponent}}, first, prefill);
  });
}

}  // namespace

void bind_hls(py::module_& parent) {
  py::module_ m = parent.def_submodule("hls", "C simulation of the accelerator's HLS units");
  m.def("rms_max", &rms_max_rows, py::arg("x"), py::arg("weight"), py::arg("eps"));
  m.def("quantize", &quantize_rows);
  m.def("dequant_fuse", &dequant_rows);
  m.def("framed_quantize", &framed_quantize);
  bind_point<Point<3, 28, 16, 4, 12288, 8192, 768>>(m);
  bind_point<Point<3, 4, 4, 2, 8192, 8192, 128>>(m);
  bind_point<Point<2, 3, 2, 1, 32768, 8192, 64>>(m);
  bind_point<Point<3, 7, 10, 3, 8192, 8192, 256>>(m);
}

}  // namespace tilewright
