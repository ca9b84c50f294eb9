// SPDX-License-Identifier: Apache-2.0
#include "engine/matrix.h"
#include "ops/int4_linear/kernels.h"

namespace tilewright::engine {
namespace {

class Int4Matrix final : public Matrix {
 public:
  Int4Matrix(const format::Int4View& view, const Activation& activation)
      : view_(view),
        activation_(activation.type == ActivationType::kInt8 ? int4_linear::Activation::kInt8
                                                             : int4_linear::Activation::kFp8),
        mode_(activation.type == ActivationType::kFp8Fold ? int4_linear::Mode::kFold : int4_linear::Mode::kExact),
        cut_{view.k, view.group, activation.scale_group == 0 ? round_up(view.k, view.group) : activation.scale_group} {
    rows = view.n;
    columns = view.k;
    // Both FP8 modes read the same activations.
    const bool int8 = activation.type == ActivationType::kInt8;
    input = {format::FormatId::kInt4,
             {int8 ? ActivationType::kInt8 : ActivationType::kFp8, cut_.scale_group},
             view.k,
             view.group};
    code_bytes = int4_linear::code_bytes(activation_, view);
    sum_bytes = int4_linear::group_sum_bytes(view);
    scale_count = int4_linear::token_scales(view, cut_.scale_group);
  }

  void plan(int64_t tokens) override {
    plan_ = int4_linear::choose_plan(tokens, view_);
    items = plan_.items;
    rows_per_item = plan_.blocks_per_item * format::Int4::kRowsPerBlock;
  }

  void prepare(const float* x, const Input& to, int64_t token) const override {
    const auto& kernels = int4_linear::kernels();
    const auto prepare_token =
        activation_ == int4_linear::Activation::kInt8 ? kernels.prepare_int8 : kernels.prepare_fp8;
    prepare_token(x, cut_, to.codes + token * code_bytes, to.scales + token * scale_count, to.sums + token * sum_bytes);
  }

  void run(const Input& from, int64_t tokens, int64_t first, int64_t last, float* y, int64_t stride) const override {
    const int4_linear::Problem problem{
        .weight = view_,
        .activation = activation_,
        .mode = mode_,
        .m = tokens,
        .scale_group = cut_.scale_group,
        .x = {from.codes, from.scales, from.sums},
        .bias = nullptr,
        .y = y,
        .y_stride = stride,
    };
    const auto& kernels = int4_linear::kernels();
    (activation_ == int4_linear::Activation::kInt8 ? kernels.int8_items : kernels.fp8_items)(problem, plan_, first,
                                                                                             last);
  }

  void row(int64_t n, float* out) const override {
    for (int64_t k = 0; k < view_.k; ++k) {
      const format::Int4Lane lane = format::int4_lane(view_, n, k / view_.group);
      const auto code = static_cast<float>(format::int4_code(view_, n, k) - lane.zero);
      out[k] = (code * lane.scale + lane.minimum) / view_.per_tensor_scale;
    }
  }

 private:
  format::Int4View view_;
  int4_linear::Activation activation_;
  int4_linear::Mode mode_;
  int4_linear::TokenCut cut_;
  int4_linear::Plan plan_{};
};

const RegisterMatrix registered{
    format::FormatId::kInt4, [](StepArena& arena, Arena blob, Activation activation, const char* record) -> Matrix* {
      const format::Int4View view = format::int4_view(blob.data, blob.bytes, record);
      require(activation.type != ActivationType::kFp8Fold || view.offset_kind == format::OffsetKind::kSymmetric,
              "engine: ", record, ": the fold mode needs symmetric weights; compile with act='fp8'");
      require(activation.scale_group % view.group == 0, "engine: ", record, ": activation scale group ",
              activation.scale_group, " is not a multiple of the weight's group ", view.group);
      return arena.make<Int4Matrix>(view, activation);
    }};

}  // namespace
}  // namespace tilewright::engine
