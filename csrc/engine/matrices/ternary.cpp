// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "engine/matrix.h"
#include "ops/ternary_linear/kernels.h"

namespace tilewright::engine {
namespace {

using format::TernaryView;

// In the arena the scales follow the packed weight at the next multiple of 64: one, or one a row.
struct Scales {
  const float* values;
  bool per_row;
};

class TernaryMatrix final : public Matrix {
 public:
  TernaryMatrix(const TernaryView& view, const Scales& scales) : view_(view), scales_(scales) {
    rows = view.n;
    columns = view.k;
    input = {format::FormatId::kTernary, Activation{}, view.k, 1};
    code_bytes = round_up(view.k, ternary_linear::kColsPerStep);
    sum_bytes = static_cast<int64_t>(sizeof(int32_t));
  }

  void plan(int64_t tokens) override {
    plan_ = ternary_linear::choose_plan(tokens, view_);
    items = plan_.items;
    rows_per_item = plan_.rows_per_item;
  }

  void prepare(const float* x, const Input& to, int64_t token) const override {
    ternary_linear::kernels().quantize(x, view_.k, reinterpret_cast<int8_t*>(to.codes) + token * code_bytes,
                                       to.scales + token, reinterpret_cast<int32_t*>(to.sums) + token);
  }

  // The integers become floats where they are.
  void run(const Input& from, int64_t tokens, int64_t first, int64_t last, float* y, int64_t stride) const override {
    const ternary_linear::Problem problem{
        .weight = view_,
        .m = tokens,
        .x = reinterpret_cast<const int8_t*>(from.codes),
        .x_stride = code_bytes,
        .sums = reinterpret_cast<const int32_t*>(from.sums),
        .tables = nullptr,
        .acc = reinterpret_cast<int32_t*>(y),
        .acc_stride = stride,
    };
    const auto& kernels = ternary_linear::kernels();
    kernels.q2(problem, plan_, first, last);
    const ternary_linear::Epilogue epilogue{
        .m = tokens,
        .stride = stride,
        .acc = problem.acc,
        .token_scales = from.scales,
        .weight_scales = scales_.values,
        .scale_per_row = scales_.per_row,
        .bias = nullptr,
        .y = y,
    };
    kernels.finish(epilogue, first * rows_per_item, std::min(view_.n, last * rows_per_item));
  }

  void row(int64_t n, float* out) const override {
    thread_local std::vector<int8_t> values;
    values.resize(static_cast<size_t>(view_.k));
    format::ternary_read_row(view_, n, values.data());
    const float scale = scales_.values[scales_.per_row ? n : 0];
    std::transform(values.begin(), values.end(), out, [scale](int8_t v) { return static_cast<float>(v) * scale; });
  }

 private:
  TernaryView view_;
  Scales scales_;
  ternary_linear::Plan plan_{};
};

Matrix* open(StepArena& arena, Arena blob, Activation, const char* record) {
  const TernaryView view = format::ternary_view(blob.data, blob.bytes, record);
  require(view.packing == format::TernaryPacking::kQ2, "engine: ", record, ": a ternary weight is packed as '",
          format::ternary_name(view.packing), "', needed 'q2'; compile the model again");
  require(view.k > 0 && view.k <= ternary_linear::kMaxK, "engine: ", record, ": a ternary weight has ", view.k,
          " columns, needed 1 .. ", ternary_linear::kMaxK);
  const int64_t payload = format::ternary_payload_bytes(view.packing, view.n, view.k);
  const int64_t at = round_up(static_cast<int64_t>(sizeof(format::PackedHeader)) + payload, kCacheLine);
  const int64_t count = (blob.bytes - at) / static_cast<int64_t>(sizeof(float));
  require(count == 1 || count == view.n, "engine: ", record, ": ", blob.bytes - at,
          " bytes of scales follow a ternary weight of ", view.n, " rows, needed 4 or ", 4 * view.n,
          "; compile the model again");
  return arena.make<TernaryMatrix>(view, Scales{reinterpret_cast<const float*>(blob.data + at), count != 1});
}

const RegisterMatrix registered{format::FormatId::kTernary, open};

}  // namespace
}  // namespace tilewright::engine
