// SPDX-License-Identifier: Apache-2.0
#include "engine/sparse.h"
#include "ops/int4_sparse/kernels.h"

namespace tilewright::engine {
namespace {

// Columns of an activation scale, as Int4Matrix cuts a token.
int64_t scale_group(const InputKind& dense) { return dense.activation.scale_group; }

int4_sparse::Activation activation_of(const Input& token, int64_t group) {
  return {reinterpret_cast<const int8_t*>(token.codes), token.scales, reinterpret_cast<const int32_t*>(token.sums),
          group};
}

template <class View>
InputKind input_of(const View& view, const Matrix& dense, const char* record) {
  require(dense.input.format == format::FormatId::kInt4 && dense.input.activation.type == ActivationType::kInt8,
          "engine: ", record, ": INT4 rows meet INT8 activations; compile with act='int8'");
  return {format::FormatId::kInt4, dense.input.activation, view.k, view.group};
}

class Int4Rows final : public SparseRows {
 public:
  Int4Rows(const format::Int4RowsView& view, const InputKind& kind) : view_(view) {
    rows = view.n;
    columns = view.k;
    row_bytes = view.row_bytes;
    input = kind;
  }

  void run(const Input& token, const int32_t* list, int64_t count, float* out) const override {
    int4_sparse::kernels().rows(view_, activation_of(token, scale_group(input)), list, count, out);
  }

 private:
  format::Int4RowsView view_;
};

class Int4Columns final : public SparseColumns {
 public:
  Int4Columns(const format::Int4ColumnsView& view, const InputKind& kind) : view_(view) {
    rows = view.n;
    columns = view.k;
    input = kind;
    outputs_per_unit = int4_sparse::kOutputsPerUnit;
    starts_at_ = round_up((columns + 1) * 4, kCacheLine);
    list_bytes = starts_at_ + round_up((view.groups + 1) * 4, kCacheLine);
  }

  int64_t workspace_bytes(int64_t outputs) const override {
    return int4_sparse::kWorkspaceFloats * round_up(outputs, outputs_per_unit) * static_cast<int64_t>(sizeof(float));
  }

  void list(const Input& token, uint8_t* list) const override {
    int4_sparse::list_inputs(view_, reinterpret_cast<const int8_t*>(token.codes), reinterpret_cast<int32_t*>(list),
                             reinterpret_cast<int32_t*>(list + starts_at_));
  }

  void run(const Input& token, const uint8_t* list, int64_t first, int64_t last, float* y,
           uint8_t* workspace) const override {
    const int4_sparse::Listed listed{reinterpret_cast<const int32_t*>(list),
                                     reinterpret_cast<const int32_t*>(list + starts_at_)};
    int4_sparse::kernels().columns(view_, activation_of(token, scale_group(input)), listed, first, last, y,
                                   reinterpret_cast<float*>(workspace));
  }

 private:
  format::Int4ColumnsView view_;
  int64_t starts_at_;
};

const RegisterSparse registered{
    format::kInt4Rows,
    [](StepArena& arena, Arena blob, const Matrix& dense, const char* record) -> SparseRows* {
      const auto view = format::int4_rows_view(blob.data, blob.bytes, record);
      return arena.make<Int4Rows>(view, input_of(view, dense, record));
    },
    format::kInt4Columns,
    [](StepArena& arena, Arena blob, const Matrix& dense, const char* record) -> SparseColumns* {
      const auto view = format::int4_columns_view(blob.data, blob.bytes, record);
      return arena.make<Int4Columns>(view, input_of(view, dense, record));
    }};

}  // namespace
}  // namespace tilewright::engine
