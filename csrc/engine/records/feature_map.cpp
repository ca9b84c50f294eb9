// SPDX-License-Identifier: Apache-2.0
// feature_map: functions of the heads of one slot each, written to another: what linear attention reads as queries, keys
// and gates.
#include "engine/call.h"
#include "ops/feature_map/kernels.h"

namespace tilewright::engine {
namespace {

using feature_map::Function;

constexpr int64_t kMaxMaps = 4;
constexpr int64_t kMaxHeads = int64_t{1} << 16;

struct Map {
  Slot source, target;
  feature_map::Problem problem;
};

class FeatureMap final : public Step {
 public:
  explicit FeatureMap(Reader& reader) {
    count_ = reader.integer("maps", 1, kMaxMaps);
    for (int64_t i = 0; i < count_; ++i) read(reader, maps_[i]);
  }

  void begin(Call& call) override { rows_ = call.rows; }

  void run(Call& call, const Lane& lane) override {
    const auto apply = feature_map::kernel();
    const Lane::Range mine = lane.share(rows_ * count_);
    for (int64_t piece = mine.first; piece < mine.last; ++piece) {
      const int64_t t = piece / count_;
      const Map& map = maps_[piece % count_];
      feature_map::Problem problem = map.problem;
      problem.x = call.slot_row(map.source, t);
      problem.out = call.slot_row(map.target, t);
      apply(problem);
    }
  }

 private:
  static void read(Reader& reader, Map& map) {
    map.source = reader.slot("source");
    map.target = reader.slot("target");
    feature_map::Problem& p = map.problem;
    p.function = static_cast<Function>(reader.integer("function", 0, feature_map::kFunctions - 1));
    p.heads = reader.integer("heads", 1, kMaxHeads);
    const int64_t source_heads = reader.integer("source heads", 1, kMaxHeads);
    reader.check(map.source.width % source_heads == 0, "slot 'source' of width ", map.source.width, " does not hold ",
                 source_heads, " heads");
    reader.check(p.heads % source_heads == 0, p.heads, " heads are not a multiple of ", source_heads, " source heads");
    p.heads_per_source = p.heads / source_heads;
    p.size = map.source.width / source_heads;
    reader.check(p.size <= feature_map::kMaxSize, "a head has size ", p.size, ", needed <= ", feature_map::kMaxSize);
    p.inner = reader.integer("inner", 1, feature_map::kMaxSize);
    reader.check(map.target.width == p.heads * feature_map::features(p.function, p.inner), "slot 'target' has width ",
                 map.target.width, ", needed ", p.heads * feature_map::features(p.function, p.inner));
    const int64_t weight_heads = reader.integer("weight heads", 0, p.heads);
    reader.check(weight_heads <= 1 || weight_heads == p.heads, "argument 'weight heads' is ", weight_heads,
                 ", needed 0 (no weight), 1 (shared) or ", p.heads);
    p.weight = weight_heads == 0 ? nullptr : reader.floats("weight", weight_heads * p.size * p.inner);
    p.weight_stride = weight_heads == p.heads ? p.size * p.inner : 0;
    reader.check(p.weight != nullptr || p.inner == p.size, "argument 'inner' is ", p.inner,
                 ", without a weight it is the head's size ", p.size);
    const int64_t bias_heads = reader.integer("bias heads", 0, p.heads);
    reader.check(bias_heads <= 1 || bias_heads == p.heads, "argument 'bias heads' is ", bias_heads,
                 ", needed 0 (no bias), 1 (shared) or ", p.heads);
    p.bias = bias_heads == 0 ? nullptr : reader.floats("bias", bias_heads * p.inner);
    p.bias_stride = bias_heads == p.heads ? p.inner : 0;
    p.factor = reader.real("factor");
    p.cap = reader.real("cap");
    reader.check(p.cap >= 0.0f, "argument 'cap' is ", p.cap, ", needed >= 0");
  }

  int64_t count_;
  Map maps_[kMaxMaps];
  int64_t rows_ = 0;
};

const RegisterRecord registered{
    {Kind::kFeatureMap, "feature_map", [](Reader& r, StepArena& a) -> Step* { return a.make<FeatureMap>(r); }}};

}  // namespace
}  // namespace tilewright::engine
