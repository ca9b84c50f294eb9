// SPDX-License-Identifier: Apache-2.0
// bfloat16 by rows: rows of the weight's own blob, and the blob of its transpose.
#include "engine/sparse.h"
#include "ops/bfloat16_linear/kernels.h"
#include "ops/sparse_gated_mlp/kernels.h"
#include "ops/sparse_gated_mlp/plan.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kUnit = kCacheLine / 2;   // outputs of one cache line

InputKind input_of(int64_t columns) { return {format::FormatId::kBFloat16, Activation{}, columns, 1}; }

class BFloat16Rows final : public SparseRows {
 public:
  explicit BFloat16Rows(const format::BFloat16View& view) : view_(view) {
    rows = view.n;
    columns = view.k;
    row_bytes = view.padded_k * static_cast<int64_t>(sizeof(uint16_t));
    input = input_of(view.k);
  }

  void run(const Input& token, const int32_t* list, int64_t count, float* out) const override {
    const bfloat16_linear::Problem problem{
        .weight = view_, .m = 1, .x = reinterpret_cast<const float*>(token.codes), .y = out, .y_stride = view_.n};
    bfloat16_linear::kernels().listed_rows(problem, list, count);
  }

 private:
  format::BFloat16View view_;
};

class BFloat16Columns final : public SparseColumns {
 public:
  explicit BFloat16Columns(const format::BFloat16View& transposed) : view_(transposed) {
    rows = transposed.k;
    columns = transposed.n;
    input = input_of(transposed.n);
    outputs_per_unit = kUnit;
    const int64_t places = round_up(columns + 1, 16) * static_cast<int64_t>(sizeof(int32_t));
    by_class_at_ = places;
    starts_at_ = 2 * places;
    h_at_ = starts_at_ + round_up((sparse_gated_mlp::kClasses + 1) * 4, kCacheLine);
    needed_at_ = h_at_ + places;
    list_bytes = needed_at_ + round_up(columns, kCacheLine);
  }

  int64_t workspace_bytes(int64_t outputs) const override {
    return sparse_gated_mlp::workspace_floats(1, outputs) * static_cast<int64_t>(sizeof(float));
  }

  void list(const Input& token, uint8_t* list) const override {
    const auto* h = reinterpret_cast<const float*>(token.codes);
    uint8_t* needed = list + needed_at_;
    for (int64_t j = 0; j < columns; ++j) needed[j] = h[j] != 0.0f;
    auto* places = reinterpret_cast<int32_t*>(list);
    const int64_t count =
        sparse_gated_mlp::list_rows(needed, columns, places, reinterpret_cast<int32_t*>(list + by_class_at_),
                                    reinterpret_cast<int32_t*>(list + starts_at_));
    auto* values = reinterpret_cast<float*>(list + h_at_);
    for (int64_t i = 0; i < count; ++i) values[i] = h[places[i]];
  }

  void run(const Input&, const uint8_t* list, int64_t first, int64_t last, float* y,
           uint8_t* workspace) const override {
    sparse_gated_mlp::Problem<uint16_t, float> problem{};
    problem.tokens = 1;
    problem.hidden = rows;
    problem.inner = columns;
    problem.stride = view_.padded_k;
    problem.down = view_.payload;
    problem.rows = reinterpret_cast<const int32_t*>(list);
    problem.by_class = reinterpret_cast<const int32_t*>(list + by_class_at_);
    problem.class_starts = reinterpret_cast<const int32_t*>(list + starts_at_);
    problem.count = problem.class_starts[sparse_gated_mlp::kClasses];
    problem.h = reinterpret_cast<float*>(const_cast<uint8_t*>(list) + h_at_);
    problem.y = y - first;
    sparse_gated_mlp::kernels<uint16_t>().down(problem, first, last, reinterpret_cast<float*>(workspace));
  }

 private:
  format::BFloat16View view_;
  int64_t by_class_at_, starts_at_, h_at_, needed_at_;
};

const RegisterSparse registered{
    format::FormatId::kBFloat16,
    [](StepArena& arena, Arena blob, const Matrix&, const char* record) -> SparseRows* {
      return arena.make<BFloat16Rows>(format::bfloat16_view(blob.data, blob.bytes, record));
    },
    format::FormatId::kBFloat16,
    [](StepArena& arena, Arena blob, const Matrix&, const char* record) -> SparseColumns* {
      return arena.make<BFloat16Columns>(format::bfloat16_view(blob.data, blob.bytes, record));
    }};

}  // namespace
}  // namespace tilewright::engine
