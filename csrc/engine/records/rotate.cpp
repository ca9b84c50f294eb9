// SPDX-License-Identifier: Apache-2.0
// rotate: rotary positions on the heads of one or more slots, in place.
#include "engine/call.h"
#include "ops/rope/kernels.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kMaxSlots = 4;

class Rotate final : public Step {
 public:
  explicit Rotate(Reader& reader) {
    angles_ = reader.slot("angles");
    reader.check(angles_.width % 2 == 0, "slot 'angles' has odd width ", angles_.width);
    count_ = reader.integer("slots", 1, kMaxSlots);
    for (int64_t i = 0; i < count_; ++i) {
      slots_[i] = reader.slot("slot");
      reader.check(slots_[i].width % angles_.width == 0, "slot 'slot' has width ", slots_[i].width,
                   ", not a multiple of the head size ", angles_.width);
    }
  }

  void begin(Call& call) override { rows_ = call.rows; }

  void run(Call& call, const Lane& lane) override {
    const auto rotate = rope::kernel();
    const Lane::Range mine = lane.share(rows_ * count_);
    for (int64_t piece = mine.first; piece < mine.last; ++piece) {
      const int64_t t = piece / count_;
      const Slot& slot = slots_[piece % count_];
      const float* angles = call.slot_row(angles_, t);
      const int64_t heads = slot.width / angles_.width;
      rotate({call.slot_row(slot, t), heads, angles_.width, angles, angles + angles_.width / 2, nullptr, 1});
    }
  }

 private:
  Slot angles_;
  int64_t count_;
  Slot slots_[kMaxSlots];
  int64_t rows_ = 0;
};

const RegisterRecord registered{
    {Kind::kRotate, "rotate", [](Reader& r, StepArena& a) -> Step* { return a.make<Rotate>(r); }}};

}  // namespace
}  // namespace tilewright::engine
