// SPDX-License-Identifier: Apache-2.0
// activation_map: target <- T(source) or target += T(source), T affine by coordinate with a strength; the source is
// normalized first where the map sits at a norm's output.
#include "engine/call.h"
#include "ops/activation_map/kernels.h"
#include "ops/rms_norm/kernels.h"

namespace tilewright::engine {
namespace {

class ActivationMap final : public Step {
 public:
  explicit ActivationMap(Reader& reader) {
    source_ = reader.slot("source");
    norm_ = reader.optional_floats("norm", source_.width);
    eps_ = reader.real("eps");
    reader.check(eps_ >= 0.0f, "argument 'eps' is ", eps_, ", needed >= 0");
    map_.width = source_.width;
    map_.weight = reader.floats("weight", source_.width);
    map_.bias = reader.floats("bias", source_.width);
    map_.strength = reader.real("strength");
    target_ = reader.slot("target", source_.width);
    map_.add = reader.integer("add", 0, 1) == 1;
  }

  void begin(Call& call) override {
    rows_ = call.rows;
    if (norm_ != nullptr) call.want_own(source_.width * static_cast<int64_t>(sizeof(float)));
  }

  void run(Call& call, const Lane& lane) override {
    const auto normalize = rms_norm::kernel();
    const auto apply = activation_map::kernel();
    const Lane::Range mine = lane.share(rows_);
    for (int64_t t = mine.first; t < mine.last; ++t) {
      const float* x = call.slot_row(source_, t);
      if (norm_ != nullptr) {
        auto* normalized = reinterpret_cast<float*>(call.own_memory(lane));
        normalize(x, norm_, source_.width, eps_, normalized);
        x = normalized;
      }
      apply(map_, x, call.slot_row(target_, t));
    }
  }

 private:
  Slot source_, target_;
  const float* norm_;  // [width] or null
  float eps_;
  activation_map::Problem map_{};
  int64_t rows_ = 0;
};

const RegisterRecord registered{{Kind::kActivationMap, "activation_map",
                                 [](Reader& r, StepArena& a) -> Step* { return a.make<ActivationMap>(r); }}};

}  // namespace
}  // namespace tilewright::engine
