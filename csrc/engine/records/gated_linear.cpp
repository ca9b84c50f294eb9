// SPDX-License-Identifier: Apache-2.0
// gated_linear: source slot, optionally normalized and then quantized once; target <- act(gate x) * (up x).
// Whoever computes some rows of the gate computes the same rows of up, so the product needs no meeting of the team.
#include "engine/call.h"
#include "ops/gated_activation/kernels.h"

namespace tilewright::engine {
namespace {

class GatedLinear final : public Step {
 public:
  GatedLinear(Reader& reader, StepArena& arena) {
    source_.read(reader, "source");
    const Activation activation = read_activation(reader);
    target_ = reader.slot("target");
    function_ = static_cast<gated_activation::Function>(reader.integer("function", 0, 1));
    gate_ = read_matrix(reader, arena, "gate", activation, target_.width, source_.width());
    gate_bias_ = reader.optional_floats("gate bias", target_.width);
    up_ = read_matrix(reader, arena, "up", activation, target_.width, source_.width());
    up_bias_ = reader.optional_floats("up bias", target_.width);
    reader.check(gate_->input == up_->input,
                 "gate and up need the same format, group and width, so that they share one input");
  }

  void begin(Call& call) override {
    rows_ = call.rows;
    gate_->plan(rows_);
    up_->plan(rows_);
    require(gate_->items == up_->items && gate_->rows_per_item == up_->rows_per_item,
            "engine: gate and up are planned differently; they must have one shape and format");
    next_.restart(gate_->items, call.lanes);
    Carver own;
    source_.begin(call, *gate_, own);
    const int64_t bytes = rows_ * gate_->rows_per_item * static_cast<int64_t>(sizeof(float));
    gate_at_ = own.take(bytes);
    up_at_ = own.take(bytes);
    call.want_own(own.used());
  }

  void run(Call& call, const Lane& lane) override {
    const Input input = source_.run(call, lane, *gate_);
    auto* gate = reinterpret_cast<float*>(call.own_memory(lane) + gate_at_);
    auto* up = reinterpret_cast<float*>(call.own_memory(lane) + up_at_);
    const int64_t stride = gate_->rows_per_item;
    const auto multiply = gated_activation::kernel(function_);
    for (int64_t item = next_.claim(lane); item != Dispenser::kNone; item = next_.claim(lane)) {
      const int64_t first = item * stride;
      const int64_t width = std::min(stride, gate_->rows - first);
      gate_->run(input, rows_, item, item + 1, gate - first, stride);
      up_->run(input, rows_, item, item + 1, up - first, stride);
      add_bias(gate, gate_bias_, first, width, stride);
      add_bias(up, up_bias_, first, width, stride);
      for (int64_t t = 0; t < rows_; ++t) {
        prefetch_columns(call.slot_row(target_, std::min(t + kRowsAhead, rows_ - 1)) + first, width);
        multiply(gate + t * stride, up + t * stride, width, call.slot_row(target_, t) + first);
      }
    }
  }

 private:
  void add_bias(float* values, const float* bias, int64_t first, int64_t width, int64_t stride) const {
    if (bias == nullptr) return;
    for (int64_t t = 0; t < rows_; ++t) {
      for (int64_t n = 0; n < width; ++n) values[t * stride + n] += bias[first + n];
    }
  }

  Dispenser next_;
  Preparation source_;
  Slot target_;
  gated_activation::Function function_;
  Matrix* gate_;
  const float* gate_bias_;
  Matrix* up_;
  const float* up_bias_;
  int64_t rows_ = 0, gate_at_ = 0, up_at_ = 0;
};

const RegisterRecord registered{
    {Kind::kGatedLinear, "gated_linear", [](Reader& r, StepArena& a) -> Step* { return a.make<GatedLinear>(r, a); }}};

}  // namespace
}  // namespace tilewright::engine
