// SPDX-License-Identifier: Apache-2.0
// logits: source slot, normalized, times the output head. Writes the rows that the caller asked for.
#include "engine/call.h"

namespace tilewright::engine {
namespace {

class Logits final : public Step {
 public:
  Logits(Reader& reader, StepArena& arena) {
    source_.read(reader, "source");
    const Activation activation = read_activation(reader);
    head_ = read_matrix(reader, arena, "head", activation, Reader::kAnyWidth, source_.width());
  }

  void begin(Call& call) override {
    require(head_->rows == call.logits_width, "engine: the output head has ", head_->rows,
            " rows, the program's logits are ", call.logits_width, " wide; compile the model again");
    rows_ = call.rows;
    head_->plan(rows_);
    next_.restart(head_->items, call.lanes);
    Carver own;
    source_.begin(call, *head_, own);
    call.want_own(own.used());
  }

  void run(Call& call, const Lane& lane) override {
    const Input input = source_.run(call, lane, *head_);
    for (int64_t item = next_.claim(lane); item != Dispenser::kNone; item = next_.claim(lane)) {
      head_->run(input, rows_, item, item + 1, call.logits, call.logits_width);
    }
    if (call.all_logits) return;
    lane.sync();
    if (lane.index == 0) spread(call);
  }

 private:
  // Rows were written one after the other; sequences without tokens get zeros in between.
  void spread(const Call& call) const {
    int64_t row = rows_;
    for (int64_t s = call.state.header().sequences - 1; s >= row && s >= 0; --s) {
      float* target = call.logits + s * call.logits_width;
      if (call.cu_seqlens[s] == call.cu_seqlens[s + 1]) {
        std::fill(target, target + call.logits_width, 0.0f);
      } else {
        --row;
        const float* from = call.logits + row * call.logits_width;
        if (row != s) std::copy(from, from + call.logits_width, target);
      }
    }
  }

  Dispenser next_;
  Preparation source_;
  Matrix* head_;
  int64_t rows_ = 0;
};

const RegisterRecord registered{
    {Kind::kLogits, "logits", [](Reader& r, StepArena& a) -> Step* { return a.make<Logits>(r, a); }}};

}  // namespace
}  // namespace tilewright::engine
