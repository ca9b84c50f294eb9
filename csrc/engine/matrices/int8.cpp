// SPDX-License-Identifier: Apache-2.0
#include "engine/matrix.h"
#include "ops/int8_linear/kernels.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kBlocksPerItem = 4;

class Int8Matrix final : public Matrix {
 public:
  explicit Int8Matrix(const format::Int8View& view) : view_(view) {
    rows = view.n;
    columns = view.k;
    input = {format::FormatId::kInt8, Activation{}, view.k, format::Int8::kGroup};
    code_bytes = 2 * view.padded_k();
    sum_bytes = view.groups * static_cast<int64_t>(sizeof(int32_t));
  }

  void plan(int64_t tokens) override {
    items = tokens == 0 ? 0 : ceil_div(view_.blocks, kBlocksPerItem);
    rows_per_item = kBlocksPerItem * format::Int8::kRowsPerBlock;
  }

  void prepare(const float* x, const Input& to, int64_t token) const override {
    to.scales[token] = int8_linear::kernels().prepare(x, view_.k, to.codes + token * code_bytes,
                                                      reinterpret_cast<int32_t*>(to.sums + token * sum_bytes));
  }

  void run(const Input& from, int64_t tokens, int64_t first, int64_t last, float* y, int64_t stride) const override {
    const int8_linear::Problem problem{
        .weight = view_,
        .m = tokens,
        .x = {from.codes, from.scales, reinterpret_cast<const int32_t*>(from.sums)},
        .y = y,
        .y_stride = stride,
    };
    int8_linear::kernels().blocks(problem, first * kBlocksPerItem, std::min(view_.blocks, last * kBlocksPerItem));
  }

  void row(int64_t n, float* out) const override { format::int8_row(view_, n, out); }

 private:
  format::Int8View view_;
};

const RegisterMatrix registered{format::FormatId::kInt8,
                                [](StepArena& arena, Arena blob, Activation, const char* record) -> Matrix* {
                                  return arena.make<Int8Matrix>(format::int8_view(blob.data, blob.bytes, record));
                                }};

}  // namespace
}  // namespace tilewright::engine
