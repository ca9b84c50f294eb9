// SPDX-License-Identifier: Apache-2.0
// The matrices of embeddings and output heads, INT8 and bfloat16: packers and linear operators.
#include "ops/bfloat16_linear/kernels.h"
#include "ops/int8_linear/kernels.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter {
namespace {

using format::FormatId;
using format::PackedHeader;

constexpr int64_t kRowsPerThread = 64;

// An empty blob of rows x cols whose header is written.
Tensor blob_of(FormatId format, format::ScaleType scale_type, int64_t rows, int64_t cols, int64_t group,
               int64_t payload_bytes) {
  PackedHeader header{};
  std::memcpy(header.magic, PackedHeader::kMagic, sizeof(header.magic));
  header.version = PackedHeader::kVersion;
  header.format = format;
  header.scale_type = scale_type;
  header.rows = rows;
  header.cols = cols;
  header.group = group;
  header.payload_bytes = payload_bytes;
  header.per_tensor_scale = 1.0f;
  Tensor blob = empty_cpu({static_cast<int64_t>(sizeof(header)) + payload_bytes}, ScalarType::Byte);
  std::memcpy(mutable_data<uint8_t>(blob), &header, sizeof(header));
  return blob;
}

void require_matrix(const Tensor& tensor, const char* op, const char* argument) {
  require_cpu(tensor, op, argument);
  require_dim(tensor, 2, op, argument, "[N, K]");
  require(tensor.size(1) > 0, op, ": ", argument, " has shape ", shape_of(tensor), ", needed at least one column");
}

Tensor int8_pack(const Tensor& codes, const Tensor& scales) {
  constexpr const char* kOp = "int8_pack";
  require_matrix(codes, kOp, "codes");
  require_matrix(scales, kOp, "scales");
  require_dtype(codes, ScalarType::Char, kOp, "codes");
  require_dtype(scales, ScalarType::Half, kOp, "scales");
  const format::Int8View layout = format::int8_layout(codes.size(0), codes.size(1));
  require_size(scales, 0, layout.n, kOp, "scales", "N");
  require_size(scales, 1, layout.groups, kOp, "scales", "ceil(K/32)");
  const Tensor c = torch::stable::contiguous(codes), s = torch::stable::contiguous(scales);
  Tensor blob = blob_of(FormatId::kInt8, format::ScaleType::kFloat16, layout.n, layout.k, format::Int8::kGroup,
                        layout.blocks * layout.block_bytes);
  uint8_t* payload = mutable_data<uint8_t>(blob) + sizeof(PackedHeader);
  torch::stable::parallel_for(0, layout.blocks, kRowsPerThread, [&](int64_t first, int64_t last) {
    format::int8_pack(layout, data<int8_t>(c), data<uint16_t>(s), payload, first, last);
  });
  return blob;
}

Tensor bfloat16_pack(const Tensor& weight) {
  constexpr const char* kOp = "bfloat16_pack";
  require_matrix(weight, kOp, "weight");
  require_dtype(weight, ScalarType::BFloat16, kOp, "weight");
  const format::BFloat16View layout = format::bfloat16_layout(weight.size(0), weight.size(1));
  const Tensor w = torch::stable::contiguous(weight);
  Tensor blob = blob_of(FormatId::kBFloat16, format::ScaleType::kBFloat16, layout.n, layout.k, layout.padded_k,
                        layout.n * layout.padded_k * 2);
  auto* payload = reinterpret_cast<uint16_t*>(mutable_data<uint8_t>(blob) + sizeof(PackedHeader));
  const auto* source = data<uint16_t>(w);
  for (int64_t n = 0; n < layout.n; ++n) {
    uint16_t* row = payload + n * layout.padded_k;
    std::copy(source + n * layout.k, source + (n + 1) * layout.k, row);
    std::fill(row + layout.k, row + layout.padded_k, uint16_t{0});
  }
  return blob;
}

// x as float [M, K], y as [..., N], blob checks that both operators share.
struct Dense {
  Tensor x, y;
  int64_t m;
};

void require_blob(const Tensor& weight, const char* op) {
  require_cpu(weight, op, "weight");
  require_dtype(weight, ScalarType::Byte, op, "weight");
  require_dim(weight, 1, op, "weight", "the one-dimensional blob of a packer");
  require(weight.is_contiguous(), op, ": weight must be contiguous; pass the packer's blob itself");
}

Dense open(const Tensor& x, int64_t n, int64_t k, int64_t out_features, const char* op) {
  require_cpu(x, op, "x");
  require(out_features == n, op, ": out_features = ", out_features, ", but weight was packed with N = ", n);
  require(x.dim() >= 1, op, ": x is a scalar, needed [..., K] with K = ", k);
  require_size(x, x.dim() - 1, k, op, "x", "K");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  return {as_float(x, op, "x"), empty_cpu(sizes, ScalarType::Float), x.numel() / k};
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, int64_t out_features) {
  constexpr const char* kOp = "int8_linear";
  require_blob(weight, kOp);
  const format::Int8View view = format::int8_view(weight.const_data_ptr(), weight.numel(), kOp);
  const Dense d = open(x, view.n, view.k, out_features, kOp);
  const Tensor codes = empty_cpu({d.m, 2 * view.padded_k()}, ScalarType::Byte);
  const Tensor scales = empty_cpu({d.m}, ScalarType::Float), sums = empty_cpu({d.m, view.groups}, ScalarType::Int);
  const auto& kernels = int8_linear::kernels();
  for (int64_t t = 0; t < d.m; ++t) {
    mutable_data<float>(scales)[t] =
        kernels.prepare(data<float>(d.x) + t * view.k, view.k, mutable_data<uint8_t>(codes) + t * 2 * view.padded_k(),
                        mutable_data<int32_t>(sums) + t * view.groups);
  }
  const int8_linear::Problem problem{.weight = view,
                                     .m = d.m,
                                     .x = {data<uint8_t>(codes), data<float>(scales), data<int32_t>(sums)},
                                     .y = mutable_data<float>(d.y),
                                     .y_stride = view.n};
  torch::stable::parallel_for(0, view.blocks, 1,
                              [&](int64_t first, int64_t last) { kernels.blocks(problem, first, last); });
  return to_type(d.y, x.scalar_type());
}

Tensor bfloat16_linear(const Tensor& x, const Tensor& weight, int64_t out_features) {
  constexpr const char* kOp = "bfloat16_linear";
  require_blob(weight, kOp);
  const format::BFloat16View view = format::bfloat16_view(weight.const_data_ptr(), weight.numel(), kOp);
  const Dense d = open(x, view.n, view.k, out_features, kOp);
  const Tensor padded = empty_cpu({d.m, view.padded_k}, ScalarType::Float);
  for (int64_t t = 0; t < d.m; ++t) {
    float* row = mutable_data<float>(padded) + t * view.padded_k;
    std::copy(data<float>(d.x) + t * view.k, data<float>(d.x) + (t + 1) * view.k, row);
    std::fill(row + view.k, row + view.padded_k, 0.0f);
  }
  const bfloat16_linear::Problem problem{
      .weight = view, .m = d.m, .x = data<float>(padded), .y = mutable_data<float>(d.y), .y_stride = view.n};
  const auto rows = bfloat16_linear::kernels().rows;
  torch::stable::parallel_for(0, view.n, kRowsPerThread,
                              [&](int64_t first, int64_t last) { rows(problem, first, last); });
  return to_type(d.y, x.scalar_type());
}

// rows [index..., K] of a blob with n rows and k columns; copy(row, out) writes one.
template <class Out, class Copy>
Tensor gather(const Tensor& index, int64_t n, int64_t k, int64_t columns, ScalarType type, const char* op,
              const Copy& copy) {
  require_cpu(index, op, "index");
  require_dtype(index, ScalarType::Long, op, "index");
  require(columns == k, op, ": columns = ", columns, ", but weight was packed with K = ", k);
  const Tensor flat = torch::stable::contiguous(index);
  std::vector<int64_t> sizes(index.sizes().begin(), index.sizes().end());
  sizes.push_back(k);
  Tensor rows = empty_cpu(sizes, type);
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const int64_t row = data<int64_t>(flat)[i];
    require(row >= 0 && row < n, op, ": index holds ", row, ", the weight has rows 0 .. ", n - 1);
    copy(row, mutable_data<Out>(rows) + i * k);
  }
  return rows;
}

Tensor int8_rows(const Tensor& weight, const Tensor& index, int64_t columns) {
  constexpr const char* kOp = "int8_rows";
  require_blob(weight, kOp);
  const format::Int8View view = format::int8_view(weight.const_data_ptr(), weight.numel(), kOp);
  return gather<float>(index, view.n, view.k, columns, ScalarType::Float, kOp,
                       [&](int64_t row, float* out) { format::int8_row(view, row, out); });
}

Tensor bfloat16_rows(const Tensor& weight, const Tensor& index, int64_t columns) {
  constexpr const char* kOp = "bfloat16_rows";
  require_blob(weight, kOp);
  const format::BFloat16View view = format::bfloat16_view(weight.const_data_ptr(), weight.numel(), kOp);
  return gather<uint16_t>(index, view.n, view.k, columns, ScalarType::BFloat16, kOp,
                          [&](int64_t row, uint16_t* out) { std::copy(view.row(row), view.row(row) + view.k, out); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def("int8_pack(Tensor codes, Tensor scales) -> Tensor");
  m.def("bfloat16_pack(Tensor weight) -> Tensor");
  m.def("int8_linear(Tensor x, Tensor weight, SymInt out_features) -> Tensor");
  m.def("bfloat16_linear(Tensor x, Tensor weight, SymInt out_features) -> Tensor");
  m.def("int8_rows(Tensor weight, Tensor index, SymInt columns) -> Tensor");
  m.def("bfloat16_rows(Tensor weight, Tensor index, SymInt columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("int8_pack", TORCH_BOX(&int8_pack));
  m.impl("bfloat16_pack", TORCH_BOX(&bfloat16_pack));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("bfloat16_linear", TORCH_BOX(&bfloat16_linear));
  m.impl("int8_rows", TORCH_BOX(&int8_rows));
  m.impl("bfloat16_rows", TORCH_BOX(&bfloat16_rows));
}

}  // namespace tilewright::torch_adapter
