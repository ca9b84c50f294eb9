// SPDX-License-Identifier: Apache-2.0
// embed: target slot <- row tokens[t] of a matrix.
#include "engine/call.h"

namespace tilewright::engine {
namespace {

class Embed final : public Step {
 public:
  Embed(Reader& reader, StepArena& arena) {
    target_ = reader.slot("target");
    table_ = read_matrix(reader, arena, "table", Activation{}, Reader::kAnyWidth, target_.width);
  }

  void begin(Call& call) override {
    for (int64_t t = 0; t < call.token_count; ++t) {
      require(call.tokens[t] >= 0 && call.tokens[t] < table_->rows, "engine: tokens[", t, "] is ", call.tokens[t],
              ", the vocabulary has ids 0..", table_->rows - 1);
    }
  }

  void run(Call& call, const Lane& lane) override {
    const Lane::Range mine = lane.share(call.token_count);
    for (int64_t t = mine.first; t < mine.last; ++t) table_->row(call.tokens[t], call.slot_row(target_, t));
  }

 private:
  Slot target_;
  Matrix* table_;
};

const RegisterRecord registered{
    {Kind::kEmbed, "embed", [](Reader& r, StepArena& a) -> Step* { return a.make<Embed>(r, a); }}};

}  // namespace
}  // namespace tilewright::engine
