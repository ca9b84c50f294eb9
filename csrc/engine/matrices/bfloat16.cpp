// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "engine/matrix.h"
#include "ops/bfloat16_linear/kernels.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kRowsPerItem = 64;

class BFloat16Matrix final : public Matrix {
 public:
  explicit BFloat16Matrix(const format::BFloat16View& view) : view_(view) {
    rows = view.n;
    columns = view.k;
    input = {format::FormatId::kBFloat16, Activation{}, view.k, 1};
    code_bytes = view.padded_k * static_cast<int64_t>(sizeof(float));
    sum_bytes = 0;
  }

  void plan(int64_t tokens) override {
    items = tokens == 0 ? 0 : ceil_div(view_.n, kRowsPerItem);
    rows_per_item = kRowsPerItem;
  }

  void prepare(const float* x, const Input& to, int64_t token) const override {
    auto* out = reinterpret_cast<float*>(to.codes + token * code_bytes);
    std::copy(x, x + view_.k, out);
    std::fill(out + view_.k, out + view_.padded_k, 0.0f);
    to.scales[token] = 1.0f;
  }

  void run(const Input& from, int64_t tokens, int64_t first, int64_t last, float* y, int64_t stride) const override {
    const bfloat16_linear::Problem problem{
        .weight = view_,
        .m = tokens,
        .x = reinterpret_cast<const float*>(from.codes),
        .y = y,
        .y_stride = stride,
    };
    bfloat16_linear::kernels().rows(problem, first * kRowsPerItem, std::min(view_.n, last * kRowsPerItem));
  }

  void row(int64_t n, float* out) const override {
    std::transform(view_.row(n), view_.row(n) + view_.k, out, format::bf16_to_float);
  }

 private:
  format::BFloat16View view_;
};

const RegisterMatrix registered{
    format::FormatId::kBFloat16, [](StepArena& arena, Arena blob, Activation, const char* record) -> Matrix* {
      return arena.make<BFloat16Matrix>(format::bfloat16_view(blob.data, blob.bytes, record));
    }};

}  // namespace
}  // namespace tilewright::engine
