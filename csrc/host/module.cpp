// SPDX-License-Identifier: Apache-2.0
// tilewright._host: build info, instruction-set levels, plans and formats, for people and tests. No tensor crosses it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/require.h"
#include "format/fp8.h"
#include "format/ternary.h"
#include "host/hls.h"
#include "host/rtl.h"
#include "isa/isa.h"
#include "microbench/microbench.h"
#include "ops/int4_fp8_attention/plan.h"
#include "ops/int4_linear/cuda/plan.h"
#include "ops/int4_linear/plan.h"
#include "ops/local_linear_attention/plan.h"
#include "ops/sparse_gated_mlp/plan.h"
#include "ops/ternary_linear/cuda/plan.h"
#include "ops/ternary_linear/plan.h"

namespace py = pybind11;

namespace tilewright {
namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cxx_standard"] = __cplusplus;
#ifdef NDEBUG
  info["assertions"] = false;
#else
  info["assertions"] = true;
#endif
  info["packed_version"] = format::PackedHeader::kVersion;
  return info;
}

py::dict int4_linear_plan(int64_t m, int64_t n, int64_t k, int64_t group) {
  const auto layout = format::int4_layout(n, k, group, format::ScaleType::kFloat16, format::OffsetKind::kSymmetric);
  const auto plan = int4_linear::choose_plan(m, layout);
  py::dict out;
  out["items"] = plan.items;
  out["blocks_per_item"] = plan.blocks_per_item;
  out["weight_bytes"] = plan.weight_bytes;
  out["operations"] = plan.operations;
  out["text"] = int4_linear::describe(plan);
  return out;
}

// Blocks as (first_query, kv_head, first, queries), key items as (first_key, kv_head, first, keys), the last two within the
// sequence that begins there.
py::dict local_linear_attention_plan(const std::vector<int64_t>& queries, const std::vector<int64_t>& keys,
                                     int64_t heads, int64_t kv_heads) {
  using namespace local_linear_attention;
  require(queries.size() == keys.size(), "local_linear_attention_plan: ", queries.size(), " query counts for ",
          keys.size(), " key counts; needed one of each a sequence");
  require(kv_heads > 0 && heads % kv_heads == 0, "local_linear_attention_plan: heads = ", heads,
          ", needed a multiple of kv_heads = ", kv_heads);
  std::vector<Segment> segments;
  int64_t query = 0, key = 0;
  for (size_t s = 0; s < queries.size(); ++s) {
    segments.push_back({query, queries[s], key, keys[s]});
    query += queries[s];
    key += keys[s];
  }
  const Plan plan = choose_plan({heads, kv_heads, 1, 1}, segments);
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> blocks, key_items;
  for (int64_t i = 0; i < plan.blocks; ++i) {
    const BlockItem item = block_item(plan, i);
    blocks.emplace_back(item.segment.first_query, item.kv_head, item.first, item.queries);
  }
  for (int64_t i = 0; i < plan.key_items; ++i) {
    const KeyItem item = key_item(plan, i);
    key_items.emplace_back(item.span->segment.first_key, item.kv_head, item.first, item.keys);
  }
  py::dict out;
  out["blocks"] = blocks;
  out["key_items"] = key_items;
  out["text"] = describe(plan);
  return out;
}

// Items as (sequence, kv_head, first_query, queries, key_begin, key_end, chunk, chunks).
py::dict int4_fp8_attention_plan(const std::vector<int64_t>& queries, const std::vector<int64_t>& lengths,
                                 int64_t heads, int64_t kv_heads, int64_t head_dim, bool causal,
                                 std::optional<int64_t> window) {
  using namespace int4_fp8_attention;
  require(queries.size() == lengths.size(), "int4_fp8_attention_plan: ", queries.size(), " query counts for ",
          lengths.size(), " lengths; needed one of each a sequence");
  std::vector<int64_t> offsets{0};
  for (const int64_t count : queries) offsets.push_back(offsets.back() + count);
  Problem problem{};
  problem.cache.scale_type = format::ScaleType::kBFloat16;
  problem.cache.heads = kv_heads;
  problem.cache.head_dim = head_dim;
  problem.packed = {static_cast<int64_t>(lengths.size()), offsets.data(), lengths.data()};
  problem.heads = heads;
  problem.causal = causal;
  problem.window = window.value_or(kNoWindow);
  const Plan plan = choose_plan(problem);
  py::list items;
  for (int64_t i = 0; i < plan.items; ++i) {
    const Item item = item_at(problem, plan, i);
    items.append(py::make_tuple(item.sequence, item.kv_head, item.first_query, item.queries, item.key_begin,
                                item.key_end, item.chunk, item.chunks));
  }
  py::dict out;
  out["items"] = items;
  out["workspace_bytes"] = plan.workspace_bytes;
  out["cache_bytes"] = plan.cache_bytes;
  out["operations"] = plan.operations;
  out["text"] = describe(plan);
  return out;
}

py::dict sparse_gated_mlp_plan(int64_t tokens, int64_t hidden, int64_t inner, int64_t active, int64_t element_bytes,
                               int64_t threads) {
  require(0 <= active && active <= inner, "sparse_gated_mlp_plan: active = ", active, ", needed 0 .. inner = ", inner);
  const auto plan = sparse_gated_mlp::choose_plan({tokens, hidden, inner, element_bytes}, active, threads);
  py::dict out;
  out["dense"] = plan.dense;
  out["rows"] = plan.rows;
  out["bytes"] = plan.bytes;
  out["operations"] = plan.operations;
  out["text"] = sparse_gated_mlp::describe(plan);
  return out;
}

double read_bandwidth(const py::buffer& buffer, int threads, double seconds) {
  const py::buffer_info info = buffer.request();
  py::gil_scoped_release release;
  return microbench::read_bytes_per_second(static_cast<const uint8_t*>(info.ptr), info.size * info.itemsize, threads,
                                           seconds);
}

double peak_operations(const std::string& kind, int threads, double seconds) {
  py::gil_scoped_release release;
  return microbench::peak_operations_per_second(kind, threads, seconds);
}

std::string ternary_linear_plan(int64_t m, int64_t n, int64_t k, int64_t packing) {
  const format::TernaryView view{n, k, format::ternary_packing(packing, "ternary_linear_plan"), nullptr};
  return ternary_linear::describe(ternary_linear::choose_plan(m, view));
}

// Symmetric weights with bfloat16 scales and no code of -8.
std::string int4_linear_device_plan(int64_t m, int64_t n, int64_t k, int64_t group, int multiprocessors) {
  const format::Int4HopperView weight =
      format::int4_hopper_layout(n, k, group, format::ScaleType::kBFloat16, format::OffsetKind::kSymmetric, true);
  return int4_linear::describe(int4_linear::choose_device_plan(m, weight, false, multiprocessors));
}

std::string ternary_linear_device_plan(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  return ternary_linear::describe(ternary_linear::choose_device_plan(m, n, k, multiprocessors));
}

template <class Format>
void bind_fp8(py::module_& m, const std::string& prefix) {
  m.def((prefix + "_encode").c_str(), &Format::encode, "Nearest code (ties to even), saturating; NaN stays NaN");
  m.def((prefix + "_decode").c_str(), &Format::decode, "Value of a code");
}

template <class Format>
uint8_t ternary_pack(const std::vector<int>& trits) {
  require(trits.size() == Format::kPerByte, "ternary pack: got ", trits.size(), " values, needed ", Format::kPerByte);
  int8_t values[Format::kPerByte];
  for (int lane = 0; lane < Format::kPerByte; ++lane) {
    const int value = trits[static_cast<size_t>(lane)];
    require(value >= -1 && value <= 1, "ternary pack: value ", value, " at ", lane, " is none of -1, 0, 1");
    values[lane] = static_cast<int8_t>(value);
  }
  return Format::pack(values);
}

template <class Format>
std::vector<int> ternary_unpack(uint8_t byte) {
  std::vector<int> trits;
  for (int lane = 0; lane < Format::kPerByte; ++lane) trits.push_back(Format::trit(byte, lane));
  return trits;
}

}  // namespace
}  // namespace tilewright

PYBIND11_MODULE(_host, m) {
  using namespace tilewright;
  m.doc() = "Introspection of tilewright's native code";
  m.def("build_info", &build_info);
  m.def("isa_detected", [] { return std::string(isa::name(isa::detected())); });
  m.def("isa_active", [] { return std::string(isa::name(isa::active())); });
  m.def("int4_fp8_attention_plan", &int4_fp8_attention_plan, py::arg("queries"), py::arg("lengths"), py::arg("heads"),
        py::arg("kv_heads"), py::arg("head_dim"), py::arg("causal") = true, py::arg("window") = py::none());
  m.def("local_linear_attention_plan", &local_linear_attention_plan, py::arg("queries"), py::arg("keys"),
        py::arg("heads"), py::arg("kv_heads"));
  m.def("sparse_gated_mlp_plan", &sparse_gated_mlp_plan, py::arg("tokens"), py::arg("hidden"), py::arg("inner"),
        py::arg("active"), py::arg("element_bytes") = 4, py::arg("threads") = 1);
  m.def("ternary_linear_plan", &ternary_linear_plan, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("packing"));
  m.def("ternary_linear_device_plan", &ternary_linear_device_plan, py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("multiprocessors"));
  m.def("int4_linear_device_plan", &int4_linear_device_plan, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("group"),
        py::arg("multiprocessors"));
  m.def("int4_linear_plan", &int4_linear_plan, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("group"));
  m.def("read_bandwidth", &read_bandwidth, py::arg("buffer"), py::arg("threads"), py::arg("seconds") = 0.5,
        "Bytes a second of a plain read of the whole buffer");
  m.def("peak_operations", &peak_operations, py::arg("kind"), py::arg("threads"), py::arg("seconds") = 0.5,
        "Multiplications and additions a second of the widest int8, bf16 or fp32 instruction");
  m.def("ternary2_pack", &ternary_pack<format::Ternary2>, "Four values of -1, 0, 1 to a byte, two bits each");
  m.def("ternary2_unpack", &ternary_unpack<format::Ternary2>);
  m.def("ternary5_pack", &ternary_pack<format::Ternary5>, "Five values of -1, 0, 1 to a byte, in base 3");
  m.def("ternary5_unpack", &ternary_unpack<format::Ternary5>);
  bind_fp8<format::E4M3>(m, "e4m3");
  bind_fp8<format::E5M2>(m, "e5m2");
  bind_hls(m);
#ifdef TILEWRIGHT_RTL_PARAMETERS
  bind_rtl(m);
#endif
}
