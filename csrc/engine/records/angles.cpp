// SPDX-License-Identifier: Apache-2.0
// angles: target slot <- cosines [D/2] and sines [D/2] of every token's position, once for all layers.
#include "engine/call.h"
#include "ops/rope/kernels.h"

namespace tilewright::engine {
namespace {

class Angles final : public Step {
 public:
  explicit Angles(Reader& reader) {
    target_ = reader.slot("target");
    reader.check(target_.width % 2 == 0, "slot 'target' has odd width ", target_.width);
    frequencies_ = reader.floats("frequencies", target_.width / 2);
    gain_ = reader.real("gain");
  }

  void run(Call& call, const Lane& lane) override {
    const int64_t pairs = target_.width / 2;
    const Lane::Range mine = lane.share(call.token_count);
    for (int64_t t = mine.first; t < mine.last; ++t) {
      float* row = call.slot_row(target_, t);
      rope::angles(call.positions[t], frequencies_, pairs, gain_, row, row + pairs);
    }
  }

 private:
  Slot target_;
  const float* frequencies_;
  float gain_;
};

const RegisterRecord registered{
    {Kind::kAngles, "angles", [](Reader& r, StepArena& a) -> Step* { return a.make<Angles>(r); }}};

}  // namespace
}  // namespace tilewright::engine
