// SPDX-License-Identifier: Apache-2.0
// select_last: from here on only the last token of each sequence matters, unless all logits are wanted. Placed after the
// last layer's attention, it saves that layer's remaining work on a prompt.
#include "engine/call.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kMaxSlots = 8;

class SelectLast final : public Step {
 public:
  explicit SelectLast(Reader& reader) {
    count_ = reader.integer("slots", 1, kMaxSlots);
    for (int64_t i = 0; i < count_; ++i) slots_[i] = reader.slot("slot");
  }

  void begin(Call& call) override {
    active_ = !call.all_logits;
    if (!active_) return;
    call.rows = 0;
    const int64_t sequences = call.state.header().sequences;
    for (int64_t s = 0; s < sequences; ++s) call.rows += call.cu_seqlens[s] < call.cu_seqlens[s + 1] ? 1 : 0;
  }

  void run(Call& call, const Lane& lane) override {
    if (!active_ || lane.index != 0) return;
    int64_t row = 0;
    for (int64_t s = 0; s < call.state.header().sequences; ++s) {
      if (call.cu_seqlens[s] == call.cu_seqlens[s + 1]) continue;
      const int64_t last = call.cu_seqlens[s + 1] - 1;
      for (int64_t i = 0; i < count_ && last != row; ++i) {
        const float* from = call.slot_row(slots_[i], last);
        std::copy(from, from + slots_[i].width, call.slot_row(slots_[i], row));
      }
      ++row;
    }
  }

 private:
  int64_t count_;
  Slot slots_[kMaxSlots];
  bool active_ = false;
};

const RegisterRecord registered{
    {Kind::kSelectLast, "select_last", [](Reader& r, StepArena& a) -> Step* { return a.make<SelectLast>(r); }}};

}  // namespace
}  // namespace tilewright::engine
