// SPDX-License-Identifier: Apache-2.0
// int4_int8_linear, int4_fp8_linear, their packer and their activation quantizers as torch operators.
#include <atomic>
#include <tuple>

#include "format/int4_hopper.h"
#include "ops/int4_linear/kernels.h"
#include "ops/int4_linear/reference.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter {
namespace {

using format::Int4HopperView;
using format::Int4View;
using format::OffsetKind;
using format::PackedHeader;
using format::ScaleType;
using int4_linear::Activation;
using int4_linear::Mode;

// Enough rows of work that waking a thread is worth it.
constexpr int64_t kTokensPerThread = 4;

ScaleType scale_type_of(const Tensor& scales, const char* op) {
  switch (scales.scalar_type()) {
    case ScalarType::Half: return ScaleType::kFloat16;
    case ScalarType::BFloat16: return ScaleType::kBFloat16;
    case ScalarType::Float: return ScaleType::kFloat32;
    default: fail(op, ": scales has dtype ", dtype_name(scales.scalar_type()), ", needed float16, bfloat16 or float32");
  }
}

OffsetKind offset_kind_of(const std::optional<Tensor>& offsets, const Tensor& scales, const char* op) {
  if (!offsets.has_value()) return OffsetKind::kSymmetric;
  if (offsets->scalar_type() == ScalarType::Byte) return OffsetKind::kZeroPoint;
  require(offsets->scalar_type() == scales.scalar_type(), op, ": offsets has dtype ",
          dtype_name(offsets->scalar_type()), ", needed uint8 (zero points) or the dtype of scales (minima)");
  return OffsetKind::kMinimum;
}

Tensor pack_blob(const Int4View& layout, const uint8_t* codes, const void* scales, const void* offsets,
                 float per_tensor_scale) {
  PackedHeader header{};
  std::memcpy(header.magic, PackedHeader::kMagic, sizeof(header.magic));
  header.version = PackedHeader::kVersion;
  header.format = format::FormatId::kInt4;
  header.scale_type = layout.scale_type;
  header.offset_kind = layout.offset_kind;
  header.rows = layout.n;
  header.cols = layout.k;
  header.group = layout.group;
  header.payload_bytes = layout.blocks * layout.block_bytes;
  header.per_tensor_scale = per_tensor_scale;
  Tensor blob = empty_cpu({static_cast<int64_t>(sizeof(header)) + header.payload_bytes}, ScalarType::Byte);
  auto* bytes = mutable_data<uint8_t>(blob);
  std::memcpy(bytes, &header, sizeof(header));
  torch::stable::parallel_for(0, layout.blocks, 1, [&](int64_t first, int64_t last) {
    format::int4_pack(layout, codes, scales, offsets, bytes + sizeof(header), first, last);
  });
  return blob;
}

Tensor int4_pack(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& offsets, int64_t cols,
                 int64_t group, double per_tensor_scale) {
  constexpr const char* kOp = "int4_pack";
  require_cpu(codes, kOp, "codes");
  require_cpu(scales, kOp, "scales");
  require_dtype(codes, ScalarType::Byte, kOp, "codes");
  require_dim(codes, 2, kOp, "codes", "[N, ceil(K/2)]");
  require_dim(scales, 2, kOp, "scales", "[N, ceil(K/group)]");
  require(cols > 0, kOp, ": K = ", cols, ", needed at least 1");
  format::require_group(group, kOp);
  const int64_t rows = codes.size(0);
  const Int4View layout =
      format::int4_layout(rows, cols, group, scale_type_of(scales, kOp), offset_kind_of(offsets, scales, kOp));
  require_size(codes, 1, ceil_div(cols, 2), kOp, "codes", "ceil(K/2)");
  require_size(scales, 0, rows, kOp, "scales", "N");
  require_size(scales, 1, layout.groups, kOp, "scales", "ceil(K/group)");
  const Tensor c = torch::stable::contiguous(codes), s = torch::stable::contiguous(scales);
  std::optional<Tensor> o;
  if (offsets.has_value()) {
    require_cpu(*offsets, kOp, "offsets");
    require_dim(*offsets, 2, kOp, "offsets", "[N, ceil(K/group)]");
    require_size(*offsets, 0, rows, kOp, "offsets", "N");
    require_size(*offsets, 1, layout.groups, kOp, "offsets", "ceil(K/group)");
    o = torch::stable::contiguous(*offsets);
  }

  return pack_blob(layout, data<uint8_t>(c), s.const_data_ptr(), o.has_value() ? o->const_data_ptr() : nullptr,
                   static_cast<float>(per_tensor_scale));
}

const PackedHeader& header_of(const Tensor& blob, const char* op) {
  require_cpu(blob, op, "blob");
  require_dtype(blob, ScalarType::Byte, op, "blob");
  require_dim(blob, 1, op, "blob", "the one-dimensional blob of a PackedInt4");
  require(blob.is_contiguous() && blob.numel() >= static_cast<int64_t>(sizeof(PackedHeader)), op,
          ": blob must be contiguous and hold a header of 64 bytes; pass the blob of a PackedInt4 itself");
  return *static_cast<const PackedHeader*>(blob.const_data_ptr());
}

bool fits_signed(const Int4View& view) {
  std::atomic<bool> fits{view.offset_kind == OffsetKind::kSymmetric};
  torch::stable::parallel_for(0, view.n, 64, [&](int64_t first, int64_t last) {
    if (fits && !format::int4_fits_signed(view, first, last)) fits = false;
  });
  return fits;
}

Tensor to_hopper(const Tensor& blob, const char* op) {
  const Int4View cpu = format::int4_view(blob.const_data_ptr(), blob.numel(), op);
  const Int4HopperView layout =
      format::int4_hopper_layout(cpu.n, cpu.k, cpu.group, cpu.scale_type, cpu.offset_kind, fits_signed(cpu));
  Tensor result = empty_cpu({layout.blob_bytes()}, ScalarType::Byte);
  auto* bytes = mutable_data<uint8_t>(result);
  PackedHeader header = header_of(blob, op);
  header.format = format::FormatId::kInt4Hopper;
  header.variant = layout.signed_codes ? 1 : 0;
  header.payload_bytes = layout.blob_bytes() - static_cast<int64_t>(sizeof(header));
  std::memset(bytes, 0, format::Int4Hopper::kPayloadOffset);
  std::memcpy(bytes, &header, sizeof(header));
  torch::stable::parallel_for(0, layout.blocks, 1, [&](int64_t first, int64_t last) {
    format::int4_to_hopper(cpu, layout, bytes + format::Int4Hopper::kPayloadOffset, first, last);
  });
  return result;
}

Tensor from_hopper(const Tensor& blob, const char* op) {
  const Int4HopperView view = format::int4_hopper_view(blob.const_data_ptr(), blob.numel(), op);
  const Int4View cpu = format::int4_layout(view.n, view.k, view.group, view.scale_type, view.offset_kind);
  const Tensor codes = empty_cpu({view.n, ceil_div(view.k, 2)}, ScalarType::Byte);
  const Tensor scales = empty_cpu({view.n, cpu.groups * format::scale_bytes(view.scale_type)}, ScalarType::Byte);
  const Tensor offsets =
      empty_cpu({view.n, cpu.groups * format::offset_bytes(view.offset_kind, view.scale_type)}, ScalarType::Byte);
  torch::stable::parallel_for(0, view.n, 64, [&](int64_t first, int64_t last) {
    format::int4_from_hopper(view, data<uint8_t>(blob) + format::Int4Hopper::kPayloadOffset,
                             mutable_data<uint8_t>(codes), mutable_data<uint8_t>(scales),
                             mutable_data<uint8_t>(offsets), first, last);
  });
  return pack_blob(cpu, data<uint8_t>(codes), scales.const_data_ptr(), offsets.const_data_ptr(),
                   header_of(blob, op).per_tensor_scale);
}

// A blob in the layout of the Hopper kernels, or in the CPU's; without loss both ways. Always a new tensor.
Tensor int4_repack(const Tensor& blob, bool hopper) {
  constexpr const char* kOp = "int4_repack";
  const bool is_hopper = header_of(blob, kOp).format == format::FormatId::kInt4Hopper;
  if (is_hopper == hopper) return torch::stable::clone(blob);
  return hopper ? to_hopper(blob, kOp) : from_hopper(blob, kOp);
}

// The number that int4_fp8_linear takes as `layout`: 0 for the CPU's.
int64_t int4_blob_layout(const Tensor& blob) {
  constexpr const char* kOp = "int4_blob_layout";
  if (header_of(blob, kOp).format != format::FormatId::kInt4Hopper) {
    format::int4_view(blob.const_data_ptr(), blob.numel(), kOp);
    return 0;
  }
  return format::int4_hopper_word(format::int4_hopper_view(blob.const_data_ptr(), blob.numel(), kOp));
}

struct Prepared {
  Tensor codes, scales, sums;
};

Prepared prepare(const Tensor& x, int64_t m, const Int4View& weight, Activation activation, int64_t scale_group) {
  const bool int8 = activation == Activation::kInt8;
  Prepared out{empty_cpu({m, int4_linear::code_bytes(activation, weight)}, ScalarType::Byte),
               empty_cpu({m, int4_linear::token_scales(weight, scale_group)}, ScalarType::Float),
               empty_cpu({m, weight.groups}, ScalarType::Float)};
  const auto& kernels = int4_linear::kernels();
  const auto token = int8 ? kernels.prepare_int8 : kernels.prepare_fp8;
  const auto* source = data<float>(x);
  auto* codes = mutable_data<uint8_t>(out.codes);
  auto* scales = mutable_data<float>(out.scales);
  auto* sums = mutable_data<float>(out.sums);
  const int4_linear::TokenCut cut{weight.k, weight.group, scale_group};
  const int64_t code_bytes = int4_linear::code_bytes(activation, weight);
  const int64_t token_scales = int4_linear::token_scales(weight, scale_group);
  torch::stable::parallel_for(0, m, kTokensPerThread, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      token(source + t * weight.k, cut, codes + t * code_bytes, scales + t * token_scales, sums + t * weight.groups);
    }
  });
  return out;
}

// How a call differs from its siblings.
struct Variant {
  Activation activation;
  Mode mode;
  int64_t scale_group;   // 0: a whole token
  bool reference;        // the float64 oracle instead of the kernels
  const char* op;
};

void run_kernels(const int4_linear::Problem& problem) {
  const int4_linear::Plan plan = int4_linear::choose_plan(problem.m, problem.weight);
  const auto& kernels = int4_linear::kernels();
  const auto run = problem.activation == Activation::kInt8 ? kernels.int8_items : kernels.fp8_items;
  torch::stable::parallel_for(0, plan.items, 1, [&](int64_t first, int64_t last) { run(problem, plan, first, last); });
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
              const Variant& variant) {
  const auto& [activation, mode, wanted_group, reference, op] = variant;
  require_cpu(x, op, "x");
  require_cpu(weight, op, "weight");
  require_dtype(weight, ScalarType::Byte, op, "weight");
  require_dim(weight, 1, op, "weight", "the one-dimensional blob of Int4Weight.pack()");
  require(weight.is_contiguous(), op, ": weight must be contiguous; pass the blob of Int4Weight.pack() itself");
  const Int4View view = format::int4_view(weight.const_data_ptr(), weight.numel(), op);
  require(out_features == view.n, op, ": out_features = ", out_features, ", but weight was packed with N = ", view.n);
  require(x.dim() >= 1, op, ": x is a scalar, needed [..., K] with K = ", view.k);
  require_size(x, x.dim() - 1, view.k, op, "x", "K");
  require(mode == Mode::kExact || view.offset_kind == OffsetKind::kSymmetric, op,
          ": mode='fold' needs a symmetric weight; use mode='exact' for weights with minima or zero points");

  const int64_t scale_group = wanted_group == 0 ? round_up(view.k, view.group) : wanted_group;
  require(scale_group > 0 && scale_group % view.group == 0, op, ": scale_group = ", scale_group,
          ", needed a multiple of the weight's group ", view.group, ", or 0 for one scale a token");

  const Tensor input = as_float(x, op, "x");
  const int64_t m = input.numel() / view.k;
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = view.n;
  Tensor y = empty_cpu(sizes, reference ? ScalarType::Double : ScalarType::Float);
  std::optional<Tensor> b;
  if (bias.has_value()) {
    require_cpu(*bias, op, "bias");
    require_dim(*bias, 1, op, "bias", "[N]");
    require_size(*bias, 0, view.n, op, "bias", "N");
    b = as_float(*bias, op, "bias");
  }
  const Prepared prepared = prepare(input, m, view, activation, scale_group);
  const int4_linear::Problem problem{
      .weight = view,
      .activation = activation,
      .mode = mode,
      .m = m,
      .scale_group = scale_group,
      .x = {prepared.codes.const_data_ptr(), data<float>(prepared.scales), prepared.sums.const_data_ptr()},
      .bias = b.has_value() ? data<float>(*b) : nullptr,
      .y = reference ? nullptr : mutable_data<float>(y),
      .y_stride = view.n,
  };
  if (reference) {
    int4_linear::reference(problem, mutable_data<double>(y));
    return y;
  }
  run_kernels(problem);
  return to_type(y, x.scalar_type());
}

Tensor int4_int8_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                        int64_t scale_group) {
  return linear(x, weight, bias, out_features,
                {Activation::kInt8, Mode::kExact, scale_group, false, "int4_int8_linear"});
}

Tensor int4_fp8_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                       bool fold, int64_t layout, const std::optional<Tensor>& residual) {
  require(!residual.has_value(),
          "int4_fp8_linear: residual is added by the CUDA kernels only; on the CPU add it to the result");
  require(layout == 0,
          "int4_fp8_linear: weight is in the layout of the CUDA kernels, but x is on the CPU; move x to the "
          "weight's device, or repack the weight with PackedInt4.to('cpu')");
  return linear(x, weight, bias, out_features,
                {Activation::kFp8, fold ? Mode::kFold : Mode::kExact, 0, false, "int4_fp8_linear"});
}

// Rounding tokens ahead of the product is for CUDA, where it is a kernel of its own.
std::tuple<Tensor, Tensor, Tensor> fp8_quantize_tokens(const Tensor& /*x*/, int64_t /*sub*/,
                                                       const std::optional<Tensor>& /*gate*/,
                                                       const std::optional<Tensor>& /*norm*/, double /*eps*/) {
  fail(
      "fp8_quantize_tokens: x is on the CPU, where int4_fp8_linear rounds the tokens itself; pass x to it, or move x "
      "with "
      ".to('cuda')");
}

// The same functions computed by the C++ oracle, in float64.
Tensor int4_linear_reference(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             int64_t out_features, int64_t scale_group, bool fp8, bool fold) {
  return linear(x, weight, bias, out_features,
                {fp8 ? Activation::kFp8 : Activation::kInt8, fold ? Mode::kFold : Mode::kExact, scale_group, true,
                 "int4_linear_reference"});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def(
      "int4_pack(Tensor codes, Tensor scales, Tensor? offsets, int cols, int group, float per_tensor_scale) -> Tensor");
  m.def("int4_int8_linear(Tensor x, Tensor weight, Tensor? bias, SymInt out_features, int scale_group=0) -> Tensor");
  m.def(
      "int4_linear_reference(Tensor x, Tensor weight, Tensor? bias, int out_features, int scale_group, bool fp8, bool "
      "fold) -> Tensor");
  m.def(
      "int4_fp8_linear(Tensor x, Tensor weight, Tensor? bias, SymInt out_features, bool fold, int layout=0, "
      "Tensor? residual=None) -> Tensor");
  m.def("int4_repack(Tensor blob, bool hopper) -> Tensor");
  m.def("int4_blob_layout(Tensor blob) -> int");
  m.def(
      "fp8_quantize_tokens(Tensor x, int sub, Tensor? gate=None, Tensor? norm=None, float eps=1e-6) -> (Tensor, "
      "Tensor, "
      "Tensor)");
  m.def(
      "int4_fp8_linear_quantized(Tensor codes, Tensor scales, Tensor sums, Tensor weight, Tensor? bias, SymInt "
      "in_features, bool fold, int layout, Tensor(a!) y, Tensor? residual=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("int4_pack", TORCH_BOX(&int4_pack));
  m.impl("fp8_quantize_tokens", TORCH_BOX(&fp8_quantize_tokens));
  m.impl("int4_repack", TORCH_BOX(&int4_repack));
  m.impl("int4_blob_layout", TORCH_BOX(&int4_blob_layout));
  m.impl("int4_int8_linear", TORCH_BOX(&int4_int8_linear));
  m.impl("int4_linear_reference", TORCH_BOX(&int4_linear_reference));
  m.impl("int4_fp8_linear", TORCH_BOX(&int4_fp8_linear));
}

}  // namespace tilewright::torch_adapter
