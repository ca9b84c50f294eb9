// SPDX-License-Identifier: Apache-2.0
// linear_attention: a matrix state for each state head of each sequence, of a size that no position changes; the
// recurrence of ops/linear_attention token by token, for prompts too, so that a token's result does not depend on the
// block it is in. Several heads may read one state: query heads that share keys and values share their state too.
// The result y is stored, or combined with what softmax attention over a window has left in a slot:
//
//   kStore      target = y
//   kAverage    target = a y + b window
//   kShared     target = (sum of values of y + mix_h that of the window) / (sum of weights of y + mix_h that of the window)
#include "engine/call.h"
#include "ops/linear_attention/kernels.h"

namespace tilewright::engine {
namespace {

using linear_attention::Decay;
using linear_attention::Problem;
using linear_attention::Rule;

constexpr int64_t kMaxHeads = int64_t{1} << 16;
constexpr int64_t kMaxSize = int64_t{1} << 12;
constexpr int64_t kMaxPosition = int64_t{1} << 31;
// Tokens of a head that one run of the kernel takes: few enough that their values stay in the first-level cache.
constexpr int64_t kBlock = 32;

enum class DecaySource : int64_t { kNone, kConstant, kHead, kChannel };
enum class Combine : int64_t { kStore, kAverage, kShared };

// A slot whose heads serve equal groups of others.
struct Heads {
  Slot slot;
  int64_t size, group;

  const float* row(const Call& call, int64_t token, int64_t head) const {
    return call.slot_row(slot, token) + head / group * size;
  }
  linear_attention::Rows<const float> rows(const Call& call, int64_t token, int64_t head) const {
    return {row(call, token, head), 0, slot.width, 0};
  }
};

class LinearAttention final : public Step {
 public:
  explicit LinearAttention(Reader& reader) {
    heads_ = reader.integer("heads", 1, kMaxHeads);
    states_ = reader.integer("state heads", 1, heads_);
    reader.check(heads_ % states_ == 0, heads_, " heads are not a multiple of ", states_, " state heads");
    rule_ = static_cast<Rule>(reader.integer("rule", 0, 1));
    const int64_t key_size = reader.integer("key size", 1, kMaxSize);
    const int64_t value_size = reader.integer("value size", 1, kMaxSize);
    q_ = read_heads(reader, "q", key_size, heads_);
    k_ = read_heads(reader, "k", key_size, states_);
    v_ = read_heads(reader, "v", value_size, states_);
    target_ = reader.slot("target", heads_ * value_size);
    read_decay(reader);
    if (rule_ == Rule::kDelta) beta_ = read_heads(reader, "beta", 1, states_);
    scale_ = reader.real("scale");
    normalize_ = reader.integer("normalize", 0, 1) == 1;
    eps_ = reader.real("eps");
    reader.check(eps_ >= 0.0f, "argument 'eps' is ", eps_, ", needed >= 0");
    skip_ = reader.integer("skip", 0, kMaxPosition);
    read_combination(reader);
  }

  void reserve(StateLayout& layout) override {
    states_at_ =
        layout.reserve_rows(layout.sequences() * states_, state_floats() * static_cast<int64_t>(sizeof(float)));
    layout.forbid_truncation();
  }

  void begin(Call& call) override {
    next_.restart(call.state.header().sequences * states_, call.lanes);
    Carver own;
    values_at_ = own.take(kBlock * columns() * static_cast<int64_t>(sizeof(float)));
    out_at_ = own.take(kBlock * readers() * columns() * static_cast<int64_t>(sizeof(float)));
    zeros_at_ = own.take(q_.size * static_cast<int64_t>(sizeof(float)));
    call.want_own(own.used());
  }

  void run(Call& call, const Lane& lane) override {
    uint8_t* own = call.own_memory(lane);
    const Memory memory{reinterpret_cast<float*>(own + values_at_), reinterpret_cast<float*>(own + out_at_),
                        reinterpret_cast<float*>(own + zeros_at_)};
    std::fill(memory.zeros, memory.zeros + q_.size, 0.0f);
    for (int64_t item = next_.claim(lane); item != Dispenser::kNone; item = next_.claim(lane)) {
      sequence(call, item / states_, item % states_, memory);
    }
  }

 private:
  struct Memory {
    float* values;  // [kBlock, columns]
    float* out;  // [kBlock, readers, columns]
    float* zeros;  // [K]
  };

  // Heads that read one state.
  int64_t readers() const { return heads_ / states_; }
  // With the sum of weights as one more column of values, each of which is 1.
  int64_t columns() const { return v_.size + (normalize_ ? 1 : 0); }
  int64_t state_floats() const { return q_.size * columns(); }

  static Heads read_heads(Reader& reader, const char* name, int64_t size, int64_t served) {
    const Slot slot = reader.slot(name);
    reader.check(slot.width % size == 0, "slot '", name, "' of width ", slot.width, " does not hold heads of size ",
                 size);
    const int64_t heads = slot.width / size;
    reader.check(served % heads == 0, "slot '", name, "' holds ", heads, " heads, needed a divisor of ", served);
    return {slot, size, served / heads};
  }

  void read_decay(Reader& reader) {
    decay_ = static_cast<DecaySource>(reader.integer("decay", 0, 3));
    if (decay_ == DecaySource::kConstant) constant_ = reader.floats("decay of heads", states_);
    if (decay_ == DecaySource::kHead) gate_ = read_heads(reader, "gate", 1, states_);
    if (decay_ == DecaySource::kChannel) gate_ = read_heads(reader, "gate", q_.size, states_);
  }

  void read_combination(Reader& reader) {
    combine_ = static_cast<Combine>(reader.integer("combine", 0, 2));
    if (combine_ == Combine::kStore) return;
    const bool shared = combine_ == Combine::kShared;
    reader.check(normalize_ || !shared, "a shared denominator needs argument 'normalize' = 1");
    window_ = reader.slot("window", heads_ * (v_.size + (shared ? 1 : 0)));
    if (shared) {
      mix_ = reader.floats("mix", heads_);
    } else {
      own_factor_ = reader.real("own factor");
      window_factor_ = reader.real("window factor");
    }
  }

  void sequence(const Call& call, int64_t sequence, int64_t head, const Memory& memory) const {
    int64_t first = call.cu_seqlens[sequence];
    const int64_t last = call.cu_seqlens[sequence + 1];
    if (first == last) return;
    float* state =
        reinterpret_cast<float*>(call.state.data + states_at_) + (sequence * states_ + head) * state_floats();
    const int64_t position = call.positions[first];
    if (position == 0) std::fill(state, state + state_floats(), 0.0f);
    // Tokens that are skipped write nothing, and read a state that nothing has been written to.
    const int64_t started = std::clamp(first + skip_ - position, first, last);
    for (; first < started; first = std::min(first + kBlock, started)) {
      const int64_t count = std::min(kBlock, started - first);
      std::fill(memory.out, memory.out + count * readers() * columns(), 0.0f);
      finish(call, first, count, head, memory.out);
    }
    for (; first < last; first += kBlock) {
      const int64_t count = std::min(kBlock, last - first);
      recur(call, first, count, head, state, memory);
      finish(call, first, count, head, memory.out);
    }
  }

  void recur(const Call& call, int64_t first, int64_t count, int64_t head, float* state, const Memory& memory) const {
    const auto run = linear_attention::kernels<float>().recurrent;
    Problem<float> p = problem(call, first, count, head, state, memory);
    if (readers() == 1) return run(p, 0);
    p.sequences.tokens = 1;
    const Decay decay = p.decay;
    for (int64_t t = 0; t < count; ++t) {
      p.decay = decay;
      p.k.data = k_.row(call, first + t, head);
      for (int64_t r = 0; r < readers(); ++r) {
        p.q.data = q_.row(call, first + t, head * readers() + r);
        p.out.data = memory.out + (t * readers() + r) * columns();
        run(p, 0);
        // The others read what the first has written: a key of zeros writes nothing.
        p.decay = Decay::kNone;
        p.k.data = memory.zeros;
      }
      p.v.data += p.v.token;
      p.beta.data += p.beta.token;
      p.g.data += p.g.token;
    }
  }

  Problem<float> problem(const Call& call, int64_t first, int64_t count, int64_t head, float* state,
                         const Memory& memory) const {
    Problem<float> p{};
    p.rule = rule_;
    p.decay = decay_ == DecaySource::kNone      ? Decay::kNone
              : decay_ == DecaySource::kChannel ? Decay::kChannel
                                                : Decay::kToken;
    p.sequences = {1, count, nullptr};
    p.heads = p.value_heads = p.parts = 1;
    p.key_size = q_.size;
    p.value_size = columns();
    p.scale = scale_;
    p.q = q_.rows(call, first, head * readers());
    p.k = k_.rows(call, first, head);
    p.v = v_.rows(call, first, head);
    if (normalize_) p.v = with_ones(p.v, count, memory.values);
    if (rule_ == Rule::kDelta) p.beta = beta_.rows(call, first, head);
    if (decay_ == DecaySource::kConstant) {
      p.g = {constant_ + head, 0, 0, 0};
    } else if (decay_ != DecaySource::kNone) {
      p.g = gate_.rows(call, first, head);
    }
    p.out = {memory.out, 0, columns(), 0};
    p.state = state;
    return p;
  }

  linear_attention::Rows<const float> with_ones(const linear_attention::Rows<const float>& v, int64_t count,
                                                float* values) const {
    for (int64_t t = 0; t < count; ++t) {
      const float* row = v.row(0, t, 0);
      std::copy(row, row + v_.size, values + t * columns());
      values[t * columns() + v_.size] = 1.0f;
    }
    return {values, 0, columns(), 0};
  }

  // From rows [count, readers] of `out` to the target.
  void finish(const Call& call, int64_t first, int64_t count, int64_t state_head, const float* out) const {
    for (int64_t i = 0; i < count * readers(); ++i) {
      const int64_t token = first + i / readers();
      const int64_t head = state_head * readers() + i % readers();
      const float* window = combine_ == Combine::kStore ? nullptr : call.slot_row(window_, token);
      combine(out + i * columns(), window, head, call.slot_row(target_, token) + head * v_.size);
    }
  }

  void combine(const float* y, const float* window, int64_t head, float* target) const {
    const int64_t size = v_.size;
    if (combine_ == Combine::kShared) {
      window += head * columns();
      const float mix = mix_[head];
      const float inverse = 1.0f / (y[size] + mix * window[size] + eps_);
      for (int64_t i = 0; i < size; ++i) target[i] = (y[i] + mix * window[i]) * inverse;
      return;
    }
    const float factor = own_factor_ * (normalize_ ? 1.0f / (y[size] + eps_) : 1.0f);
    if (combine_ == Combine::kStore) {
      for (int64_t i = 0; i < size; ++i) target[i] = factor * y[i];
    } else {
      window += head * size;
      for (int64_t i = 0; i < size; ++i) target[i] = factor * y[i] + window_factor_ * window[i];
    }
  }

  Dispenser next_;
  int64_t heads_, states_;
  Rule rule_;
  Heads q_{}, k_{}, v_{}, gate_{}, beta_{};
  Slot target_, window_{};
  DecaySource decay_ = DecaySource::kNone;
  const float* constant_ = nullptr;  // natural logarithms [state heads]
  float scale_, eps_;
  bool normalize_;
  int64_t skip_;  // tokens at these first positions are not written
  Combine combine_ = Combine::kStore;
  const float* mix_ = nullptr;  // [heads]
  float own_factor_ = 1.0f, window_factor_ = 0.0f;
  int64_t states_at_ = 0, values_at_ = 0, out_at_ = 0, zeros_at_ = 0;
};

const RegisterRecord registered{{Kind::kLinearAttention, "linear_attention",
                                 [](Reader& r, StepArena& a) -> Step* { return a.make<LinearAttention>(r); }}};

}  // namespace
}  // namespace tilewright::engine
