// SPDX-License-Identifier: Apache-2.0
// ternary_matmul, ternary_linear, their packer and their activation quantizer as torch operators, on the CPU.
#include "torch/ternary_linear.h"

#include "core/memory.h"
#include "ops/ternary_linear/kernels.h"
#include "ops/ternary_linear/probe.h"
#include "ops/ternary_linear/reference.h"

namespace tilewright::torch_adapter {
namespace {

using format::TernaryPacking;
using format::TernaryView;
using ternary_linear::Epilogue;
using ternary_linear::Plan;
using ternary_linear::Problem;

// Enough rows of work that waking a thread is worth it.
constexpr int64_t kTokensPerThread = 4;

TernaryView view_of(const Tensor& data, const char* op) {
  require_cpu(data, op, "data");
  require_ternary_blob(data, op);
  return format::ternary_view(data.const_data_ptr(), data.numel(), op);
}

// A blob with its header, payload unwritten.
Tensor new_blob(TernaryPacking packing, int64_t n, int64_t k, const char* op) {
  format::require_ternary_shape(packing, n, k, op);
  const format::PackedHeader header = format::ternary_header(packing, n, k);
  Tensor blob = empty_cpu({static_cast<int64_t>(sizeof(header)) + header.payload_bytes}, ScalarType::Byte);
  std::memcpy(blob.mutable_data_ptr(), &header, sizeof(header));
  return blob;
}

uint8_t* payload_of(const Tensor& blob) { return mutable_data<uint8_t>(blob) + sizeof(format::PackedHeader); }

// Rows in pieces whose bytes no other piece touches.
template <class Rows>
void each_row(const TernaryView& view, const Rows& rows) {
  const int64_t piece = format::ternary_rows_together(view);
  torch::stable::parallel_for(0, ceil_div(view.n, piece), 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first * piece; n < std::min(view.n, last * piece); ++n) rows(n);
  });
}

void write_block_scales(const TernaryView& view, const std::optional<Tensor>& scales, uint8_t* payload) {
  const int64_t blocks = format::ternary_scale_blocks(view);
  if (blocks == 0) return;
  const Tensor s = torch::stable::contiguous(*scales);
  for (int64_t n = 0; n < view.n; ++n) {
    for (int64_t b = 0; b < blocks; ++b) {
      std::memcpy(payload + format::ternary_scale_at(view, n, b), data<uint16_t>(s) + n, sizeof(uint16_t));
    }
  }
}

Tensor ternary_pack(const Tensor& weight, const std::optional<Tensor>& row_scales, int64_t packing_id) {
  constexpr const char* kOp = "ternary_pack";
  require_cpu(weight, kOp, "weight");
  require_dtype(weight, ScalarType::Char, kOp, "weight");
  require_dim(weight, 2, kOp, "weight", "[N, K]");
  const TernaryPacking packing = format::ternary_packing(packing_id, kOp);
  const Tensor w = torch::stable::contiguous(weight);
  const int64_t n = w.size(0), k = w.size(1);
  const Tensor blob = new_blob(packing, n, k, kOp);
  uint8_t* payload = payload_of(blob);
  const TernaryView view{n, k, packing, payload};
  if (format::ternary_scale_blocks(view) != 0) {
    require(row_scales.has_value(), kOp, ": packing '", format::ternary_name(packing),
            "' stores a float16 scale, but row_scales is None");
    require_cpu(*row_scales, kOp, "row_scales");
    require_dtype(*row_scales, ScalarType::Half, kOp, "row_scales");
    require_dim(*row_scales, 1, kOp, "row_scales", "[N]");
    require_size(*row_scales, 0, n, kOp, "row_scales", "N");
  }
  const auto* values = data<int8_t>(w);
  for (int64_t i = 0; i < n * k; ++i) {
    require(values[i] >= -1 && values[i] <= 1, kOp, ": weight holds ", static_cast<int>(values[i]), " at [", i / k,
            ", ", i % k, "], needed -1, 0 or 1; round it first, for instance with quantize_ternary");
  }
  format::ternary_clear(view, payload);
  each_row(view, [&](int64_t row) { format::ternary_write_row(view, row, values + row * k, payload); });
  write_block_scales(view, row_scales, payload);
  return blob;
}

Tensor ternary_unpack(const Tensor& blob, int64_t rows, int64_t cols, int64_t packing) {
  constexpr const char* kOp = "ternary_unpack";
  const TernaryView view = view_of(blob, kOp);
  require(rows == view.n && cols == view.k && packing == static_cast<int64_t>(view.packing), kOp, ": data holds [",
          view.n, ", ", view.k, "] as '", format::ternary_name(view.packing), "', asked for [", rows, ", ", cols,
          "] with packing ", packing);
  Tensor out = empty_cpu({view.n, view.k}, ScalarType::Char);
  auto* values = mutable_data<int8_t>(out);
  torch::stable::parallel_for(0, view.n, 16, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) format::ternary_read_row(view, n, values + n * view.k);
  });
  return out;
}

// Bytes of another program, checked, behind our header.
Tensor ternary_wrap(const Tensor& payload, int64_t rows, int64_t cols, int64_t packing_id) {
  constexpr const char* kOp = "ternary_wrap";
  require_cpu(payload, kOp, "payload");
  require_dtype(payload, ScalarType::Byte, kOp, "payload");
  const TernaryPacking packing = format::ternary_packing(packing_id, kOp);
  format::require_ternary_shape(packing, rows, cols, kOp);
  const int64_t needed = format::ternary_payload_bytes(packing, rows, cols);
  require(payload.numel() == needed, kOp, ": payload has ", payload.numel(), " bytes, [", rows, ", ", cols, "] as '",
          format::ternary_name(packing), "' has ", needed);
  const Tensor bytes = torch::stable::contiguous(payload);
  Tensor blob = new_blob(packing, rows, cols, kOp);
  std::copy_n(data<uint8_t>(bytes), needed, payload_of(blob));
  const TernaryView view{rows, cols, packing, payload_of(blob)};
  std::vector<int8_t> row(static_cast<size_t>(cols));
  for (int64_t n = 0; n < rows; ++n) {
    format::ternary_read_row(view, n, row.data());
    const auto bad = std::find_if(row.begin(), row.end(), [](int8_t v) { return v < -1 || v > 1; });
    require(bad == row.end(), kOp, ": payload holds a code that stands for no ternary value at [", n, ", ",
            bad - row.begin(), "]; it is not '", format::ternary_name(packing), "'");
  }
  return blob;
}

// (N, K, packing) of a blob.
std::tuple<int64_t, int64_t, int64_t> ternary_describe(const Tensor& blob) {
  const TernaryView view = view_of(blob, "ternary_describe");
  return {view.n, view.k, static_cast<int64_t>(view.packing)};
}

// float16 [N, blocks]: the scales inside a weight of llama.cpp.
Tensor ternary_block_scales(const Tensor& blob) {
  const TernaryView view = view_of(blob, "ternary_block_scales");
  const int64_t blocks = format::ternary_scale_blocks(view);
  Tensor out = empty_cpu({view.n, blocks}, ScalarType::Half);
  for (int64_t n = 0; n < view.n; ++n) {
    for (int64_t b = 0; b < blocks; ++b) {
      std::memcpy(mutable_data<uint16_t>(out) + n * blocks + b, view.payload + format::ternary_scale_at(view, n, b), 2);
    }
  }
  return out;
}

// Codes of all tokens with rows padded by zeros, and what belongs to each.
struct Tokens {
  Tensor codes, sums;
  std::optional<Tensor> scales;
};

int64_t padded(int64_t k) { return round_up(k, ternary_linear::kColsPerStep); }

Tokens given(const Tensor& x, int64_t m, int64_t k) {
  const int64_t stride = padded(k);
  Tokens tokens{torch::stable::contiguous(x), empty_cpu({m}, ScalarType::Int), std::nullopt};
  if (stride != k) {
    const Tensor wide = empty_cpu({m, stride}, ScalarType::Char);
    for (int64_t t = 0; t < m; ++t) {
      auto* row = mutable_data<int8_t>(wide) + t * stride;
      std::copy_n(data<int8_t>(tokens.codes) + t * k, k, row);
      std::fill(row + k, row + stride, int8_t{0});
    }
    tokens.codes = wide;
  }
  const auto sum = ternary_linear::kernels().sum;
  const auto* codes = data<int8_t>(tokens.codes);
  auto* sums = mutable_data<int32_t>(tokens.sums);
  torch::stable::parallel_for(0, m, kTokensPerThread, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) sums[t] = sum(codes + t * stride, stride);
  });
  return tokens;
}

Tokens quantized(const Tensor& x, int64_t m, int64_t k) {
  const int64_t stride = padded(k);
  Tokens tokens{empty_cpu({m, stride}, ScalarType::Char), empty_cpu({m}, ScalarType::Int),
                empty_cpu({m}, ScalarType::Float)};
  const auto quantize = ternary_linear::kernels().quantize;
  auto* codes = mutable_data<int8_t>(tokens.codes);
  auto* sums = mutable_data<int32_t>(tokens.sums);
  auto* scales = mutable_data<float>(*tokens.scales);
  torch::stable::parallel_for(0, m, kTokensPerThread, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      quantize(data<float>(x) + t * k, k, codes + t * stride, scales + t, sums + t);
    }
  });
  return tokens;
}

// t3w: items of rows [first, last) for all the problem's tokens, a few at a time. The tables are the thread's own: read from
// another thread's cache they would take longer than made twice.
void look_up(Problem problem, const Plan& plan, const ternary_linear::Kernels& kernels, int64_t first, int64_t last) {
  thread_local Scratch memory;
  const int64_t entries = ternary_linear::table_entries(problem.weight.k), tokens = problem.m;
  auto* table = memory.get<int16_t>(std::min(tokens, plan.tokens_per_call) * entries);
  problem.tables = table;
  for (int64_t m = 0; m < tokens; m += plan.tokens_per_call) {
    problem.m = std::min(plan.tokens_per_call, tokens - m);
    for (int64_t t = 0; t < problem.m; ++t) {
      kernels.tables(problem.x + t * problem.x_stride, problem.weight.k, table + t * entries);
    }
    kernels.t3w(problem, plan, first, last);
    problem.x += problem.m * problem.x_stride;
    problem.sums += problem.m;
    problem.acc += problem.m * problem.acc_stride;
  }
}

// Threads share out the tokens where each has as many as have tables at a time, else the rows.
void run_with_tables(const Problem& problem, const Plan& plan, const ternary_linear::Kernels& kernels) {
  const int64_t calls = ceil_div(problem.m, plan.tokens_per_call);
  if (calls < torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, plan.items, 1,
                                [&](int64_t first, int64_t last) { look_up(problem, plan, kernels, first, last); });
    return;
  }
  torch::stable::parallel_for(0, calls, 1, [&](int64_t first, int64_t last) {
    const int64_t from = first * plan.tokens_per_call, to = std::min(problem.m, last * plan.tokens_per_call);
    Problem part = problem;
    part.m = to - from;
    part.x += from * problem.x_stride;
    part.sums += from;
    part.acc += from * problem.acc_stride;
    look_up(part, plan, kernels, 0, plan.items);
  });
}

void run(const TernaryView& view, const Tokens& tokens, int64_t m, int32_t* acc) {
  const Plan plan = ternary_linear::choose_plan(m, view);
  const Problem problem{
      .weight = view,
      .m = m,
      .x = data<int8_t>(tokens.codes),
      .x_stride = padded(view.k),
      .sums = data<int32_t>(tokens.sums),
      .tables = nullptr,
      .acc = acc,
      .acc_stride = view.n,
  };
  const auto& kernels = ternary_linear::kernels();
  const auto kernel = ternary_linear::kernel_for(kernels, view.packing);
  if (kernel == kernels.t3w) return run_with_tables(problem, plan, kernels);
  torch::stable::parallel_for(0, plan.items, 1,
                              [&](int64_t first, int64_t last) { kernel(problem, plan, first, last); });
}

TernaryView checked_view(const Tensor& blob, int64_t out_features, int64_t packing, const char* op) {
  const TernaryView view = view_of(blob, op);
  require(out_features == view.n, op, ": out_features = ", out_features, ", but data was packed with N = ", view.n);
  require(packing == static_cast<int64_t>(view.packing), op, ": packing = ", packing, ", but data was packed as '",
          format::ternary_name(view.packing), "' (", static_cast<int>(view.packing), ")");
  require_ternary_columns(view.k, op);
  return view;
}

Tensor ternary_matmul(const Tensor& x, const Tensor& blob, int64_t out_features, int64_t packing) {
  constexpr const char* kOp = "ternary_matmul";
  require_cpu(x, kOp, "x");
  const TernaryView view = checked_view(blob, out_features, packing, kOp);
  require_codes(x, view.k, kOp);
  const int64_t m = rows_of(x);
  Tensor y = empty_cpu(with_last(x, view.n), ScalarType::Int);
  run(view, given(x, m, view.k), m, mutable_data<int32_t>(y));
  return y;
}

Tensor ternary_matmul_reference(const Tensor& x, const Tensor& blob) {
  constexpr const char* kOp = "ternary_matmul_reference";
  require_cpu(x, kOp, "x");
  const TernaryView view = view_of(blob, kOp);
  require_codes(x, view.k, kOp);
  const Tensor codes = torch::stable::contiguous(x);
  Tensor y = empty_cpu(with_last(x, view.n), ScalarType::Long);
  ternary_linear::reference(view, data<int8_t>(codes), rows_of(x), mutable_data<int64_t>(y));
  return y;
}

Tensor ternary_linear_cpu(const Tensor& x, const Tensor& blob, const Tensor& scale, const std::optional<Tensor>& bias,
                          int64_t out_features, int64_t packing, std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "ternary_linear";
  require_cpu(x, kOp, "x");
  require_cpu(scale, kOp, "scale");
  if (bias.has_value()) require_cpu(*bias, kOp, "bias");
  const TernaryView view = checked_view(blob, out_features, packing, kOp);
  const LinearArguments arguments = check_linear(x, view.n, view.k, scale, bias, out_dtype, kOp);
  const Tensor input = as_float(x, kOp, "x"), weight_scales = as_float(scale, kOp, "scale");
  std::optional<Tensor> b;
  if (bias.has_value()) b = as_float(*bias, kOp, "bias");
  const int64_t m = rows_of(x);
  const Tokens tokens = quantized(input, m, view.k);
  // The integers become floats where they are.
  Tensor y = empty_cpu(with_last(x, view.n), ScalarType::Float);
  auto* acc = static_cast<int32_t*>(y.mutable_data_ptr());
  run(view, tokens, m, acc);
  const Epilogue epilogue{
      .m = m,
      .stride = view.n,
      .acc = acc,
      .token_scales = data<float>(*tokens.scales),
      .weight_scales = data<float>(weight_scales),
      .scale_per_row = scale.numel() != 1,
      .bias = b.has_value() ? data<float>(*b) : nullptr,
      .y = mutable_data<float>(y),
  };
  const auto finish = ternary_linear::kernels().finish;
  torch::stable::parallel_for(0, m == 0 ? 0 : view.n, 512,
                              [&](int64_t first, int64_t last) { finish(epilogue, first, last); });
  return to_type(y, arguments.out);
}

std::tuple<Tensor, Tensor> ternary_quantize(const Tensor& x) {
  constexpr const char* kOp = "ternary_quantize";
  require_cpu(x, kOp, "x");
  require(x.dim() >= 1, kOp, ": x is a scalar, needed [..., K]");
  const Tensor input = as_float(x, kOp, "x");
  const int64_t m = rows_of(x), k = x.size(x.dim() - 1);
  const Tokens tokens = quantized(input, m, k);
  Tensor codes = empty_cpu({x.sizes().begin(), x.sizes().end()}, ScalarType::Char);
  for (int64_t t = 0; t < m; ++t) {
    std::copy_n(data<int8_t>(tokens.codes) + t * padded(k), k, mutable_data<int8_t>(codes) + t * k);
  }
  Tensor scales = empty_cpu({x.sizes().begin(), x.sizes().end() - 1}, ScalarType::Float);
  std::copy_n(data<float>(*tokens.scales), m, mutable_data<float>(scales));
  return {codes, scales};
}

int64_t ternary_fastest(int64_t rows, int64_t cols, int64_t tokens) {
  return static_cast<int64_t>(ternary_linear::fastest_packing(rows, cols, tokens));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def("ternary_pack(Tensor weight, Tensor? row_scales, int packing) -> Tensor");
  m.def("ternary_unpack(Tensor data, SymInt rows, SymInt cols, int packing) -> Tensor");
  m.def("ternary_wrap(Tensor payload, int rows, int cols, int packing) -> Tensor");
  m.def("ternary_block_scales(Tensor data) -> Tensor");
  m.def("ternary_describe(Tensor data) -> (int, int, int)");
  m.def("ternary_fastest(int rows, int cols, int tokens) -> int");
  m.def("ternary_quantize(Tensor x) -> (Tensor, Tensor)");
  m.def("ternary_matmul(Tensor x, Tensor data, SymInt out_features, int packing) -> Tensor");
  m.def("ternary_matmul_reference(Tensor x, Tensor data) -> Tensor");
  m.def(
      "ternary_linear(Tensor x, Tensor data, Tensor scale, Tensor? bias, SymInt out_features, int packing, ScalarType? "
      "out_dtype=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("ternary_pack", TORCH_BOX(&ternary_pack));
  m.impl("ternary_unpack", TORCH_BOX(&ternary_unpack));
  m.impl("ternary_wrap", TORCH_BOX(&ternary_wrap));
  m.impl("ternary_block_scales", TORCH_BOX(&ternary_block_scales));
  m.impl("ternary_describe", TORCH_BOX(&ternary_describe));
  m.impl("ternary_quantize", TORCH_BOX(&ternary_quantize));
  m.impl("ternary_matmul", TORCH_BOX(&ternary_matmul));
  m.impl("ternary_matmul_reference", TORCH_BOX(&ternary_matmul_reference));
  m.impl("ternary_linear", TORCH_BOX(&ternary_linear_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CompositeExplicitAutograd, m) {
  m.impl("ternary_fastest", TORCH_BOX(&ternary_fastest));
}

}  // namespace tilewright::torch_adapter
