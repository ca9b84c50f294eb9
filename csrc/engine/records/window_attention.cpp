// SPDX-License-Identifier: Apache-2.0
// window_attention: softmax attention over the last W tokens, kept in a ring: the state does not grow. The token that
// leaves the window may be handed on, to linear attention over everything older.
#include "engine/call.h"
#include "ops/window_attention/kernels.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kMaxHeads = int64_t{1} << 16;
constexpr int64_t kMaxSize = int64_t{1} << 16;
constexpr int64_t kMaxWindow = int64_t{1} << 24;

class WindowAttention final : public Step {
 public:
  explicit WindowAttention(Reader& reader) {
    heads_ = reader.integer("heads", 1, kMaxHeads);
    kv_heads_ = reader.integer("kv_heads", 1, kMaxHeads);
    reader.check(heads_ % kv_heads_ == 0, heads_, " heads are not a multiple of ", kv_heads_, " KV heads");
    key_size_ = reader.integer("key size", 1, kMaxSize);
    value_size_ = reader.integer("value size", 1, kMaxSize);
    window_ = reader.integer("window", 1, kMaxWindow);
    scale_ = reader.real("scale");
    normalize_ = reader.integer("normalize", 0, 1) == 1;
    q_ = reader.slot("q", heads_ * key_size_);
    k_ = reader.slot("k", kv_heads_ * key_size_);
    v_ = reader.slot("v", kv_heads_ * value_size_);
    target_ = reader.slot("target", heads_ * (value_size_ + (normalize_ ? 0 : 1)));
    k_leaving_ = reader.optional_slot("k leaving", k_.width);
    v_leaving_ = reader.optional_slot("v leaving", v_.width);
  }

  void reserve(StateLayout& layout) override {
    ring_ = round_up(window_attention::ring_floats(window_, key_size_, value_size_), kLineFloats);
    rings_at_ = layout.reserve_rows(layout.sequences() * kv_heads_, ring_ * static_cast<int64_t>(sizeof(float)));
    layout.forbid_truncation();
  }

  void begin(Call& call) override {
    next_.restart(call.state.header().sequences * kv_heads_, call.lanes);
    call.want_own(window_attention::padded_rows(window_) * static_cast<int64_t>(sizeof(float)));
  }

  void run(Call& call, const Lane& lane) override {
    const auto attend = window_attention::kernel();
    auto* weights = reinterpret_cast<float*>(call.own_memory(lane));
    for (int64_t item = next_.claim(lane); item != Dispenser::kNone; item = next_.claim(lane)) {
      const int64_t sequence = item / kv_heads_;
      if (call.cu_seqlens[sequence] < call.cu_seqlens[sequence + 1]) {
        attend(problem(call, sequence, item % kv_heads_, weights));
      }
    }
  }

 private:
  static constexpr int64_t kLineFloats = kCacheLine / static_cast<int64_t>(sizeof(float));

  window_attention::Problem problem(const Call& call, int64_t sequence, int64_t head, float* weights) const {
    const int64_t first = call.cu_seqlens[sequence];
    float* ring = reinterpret_cast<float*>(call.state.data + rings_at_) + (sequence * kv_heads_ + head) * ring_;
    const int64_t group = heads_ / kv_heads_;
    return {
        .window = window_,
        .heads = group,
        .key_size = key_size_,
        .value_size = value_size_,
        .scale = scale_,
        .normalize = normalize_,
        .keys = ring,
        .values = ring + window_attention::padded_rows(window_) * key_size_,
        .position = call.positions[first],
        .tokens = call.cu_seqlens[sequence + 1] - first,
        .q = call.slot_row(q_, first) + head * group * key_size_,
        .k = call.slot_row(k_, first) + head * key_size_,
        .v = call.slot_row(v_, first) + head * value_size_,
        .out = call.slot_row(target_, first) + head * (target_.width / kv_heads_),
        .k_leaving = k_leaving_.width == 0 ? nullptr : call.slot_row(k_leaving_, first) + head * key_size_,
        .v_leaving = v_leaving_.width == 0 ? nullptr : call.slot_row(v_leaving_, first) + head * value_size_,
        .q_stride = q_.width,
        .k_stride = k_.width,
        .v_stride = v_.width,
        .out_stride = target_.width,
        .k_leaving_stride = k_leaving_.width,
        .v_leaving_stride = v_leaving_.width,
        .weights = weights,
    };
  }

  Dispenser next_;
  int64_t heads_, kv_heads_, key_size_, value_size_, window_;
  float scale_;
  bool normalize_;
  Slot q_, k_, v_, target_;
  Slot k_leaving_, v_leaving_;   // width 0: not wanted
  int64_t ring_ = 0, rings_at_ = 0;
};

const RegisterRecord registered{{Kind::kWindowAttention, "window_attention",
                                 [](Reader& r, StepArena& a) -> Step* { return a.make<WindowAttention>(r); }}};

}  // namespace
}  // namespace tilewright::engine
