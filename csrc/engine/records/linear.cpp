// SPDX-License-Identifier: Apache-2.0
// linear: source slot, optionally normalized and then quantized once, times one or more matrices; each result is stored
// in its slot or added to it (the residual).
#include "engine/call.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kMaxOutputs = 4;

struct Output {
  Matrix* matrix;
  const float* bias;  // [N] or null
  Slot target;
  bool add;
};

class Linear final : public Step {
 public:
  Linear(Reader& reader, StepArena& arena) {
    source_.read(reader, "source");
    const Activation activation = read_activation(reader);
    count_ = reader.integer("outputs", 1, kMaxOutputs);
    for (int64_t i = 0; i < count_; ++i) {
      Output& output = outputs_[i];
      output.target = reader.slot("target");
      output.add = reader.integer("add", 0, 1) == 1;
      output.matrix = read_matrix(reader, arena, "weight", activation, output.target.width, source_.width());
      output.bias = reader.optional_floats("bias", output.target.width);
      reader.check(output.matrix->input == outputs_[0].matrix->input,
                   "weights of one record need the same format, group and width, so that they share one input");
    }
  }

  void begin(Call& call) override {
    rows_ = call.rows;
    items_ = 0;
    widest_ = 0;
    for (int64_t i = 0; i < count_; ++i) {
      outputs_[i].matrix->plan(rows_);
      items_ += outputs_[i].matrix->items;
      if (outputs_[i].add) widest_ = std::max(widest_, outputs_[i].matrix->rows_per_item);
    }
    next_.restart(items_, call.lanes);
    Carver own;
    source_.begin(call, *outputs_[0].matrix, own);
    sum_at_ = own.take(rows_ * widest_ * static_cast<int64_t>(sizeof(float)));
    call.want_own(own.used());
  }

  void run(Call& call, const Lane& lane) override {
    const Input input = source_.run(call, lane, *outputs_[0].matrix);
    auto* sums = reinterpret_cast<float*>(call.own_memory(lane) + sum_at_);
    for (int64_t claimed = next_.claim(lane); claimed != Dispenser::kNone; claimed = next_.claim(lane)) {
      const Output* output = outputs_;
      int64_t item = claimed;
      for (; item >= output->matrix->items; ++output) item -= output->matrix->items;
      run_item(call, input, *output, item, sums);
    }
  }

 private:
  void run_item(Call& call, const Input& input, const Output& output, int64_t item, float* sums) const {
    const Matrix& matrix = *output.matrix;
    const int64_t first = item * matrix.rows_per_item;
    const int64_t width = std::min(matrix.rows_per_item, matrix.rows - first);
    float* target = call.slot(output.target);
    const int64_t stride = output.target.width;
    if (!output.add) {
      matrix.run(input, rows_, item, item + 1, target, stride);
      if (output.bias == nullptr) return;
      for (int64_t t = 0; t < rows_; ++t) {
        for (int64_t n = first; n < first + width; ++n) target[t * stride + n] += output.bias[n];
      }
      return;
    }
    // The kernel counts columns from the matrix's first row; the buffer holds this item's only.
    matrix.run(input, rows_, item, item + 1, sums - first, matrix.rows_per_item);
    for (int64_t t = 0; t < rows_; ++t) {
      const float* sum = sums + t * matrix.rows_per_item;
      float* row = target + t * stride + first;
      prefetch_columns(target + std::min(t + kRowsAhead, rows_ - 1) * stride + first, width);
      if (output.bias == nullptr) {
        for (int64_t n = 0; n < width; ++n) row[n] += sum[n];
      } else {
        for (int64_t n = 0; n < width; ++n) row[n] += sum[n] + output.bias[first + n];
      }
    }
  }

  Dispenser next_;
  Preparation source_;
  int64_t count_;
  Output outputs_[kMaxOutputs];
  int64_t rows_ = 0, items_ = 0, widest_ = 0, sum_at_ = 0;
};

const RegisterRecord registered{
    {Kind::kLinear, "linear", [](Reader& r, StepArena& a) -> Step* { return a.make<Linear>(r, a); }}};

}  // namespace
}  // namespace tilewright::engine
