// SPDX-License-Identifier: Apache-2.0
// attention: rotates q and k, appends k and v to this layer's cache, attends over it.
#include <memory>

#include "engine/call.h"
#include "ops/int4_fp8_attention/kernels.h"
#include "ops/rope/kernels.h"

namespace tilewright::engine {
namespace {

using int4_fp8_attention::Append;
using int4_fp8_attention::Cache;
using int4_fp8_attention::CacheFormat;
using int4_fp8_attention::Packed;
using int4_fp8_attention::Plan;
using int4_fp8_attention::Problem;
using int4_fp8_attention::Query;

constexpr int64_t kMaxHeads = int64_t{1} << 16;

// Layers of one shape share a plan and, since they run one after the other, the workspace of their partial results.
struct Shared {
  uint64_t serial = 0;
  int64_t heads = 0, kv_heads = 0, head_dim = 0, window = 0;
  Plan plan{};
  Scratch memory;
  uint8_t* workspace = nullptr;
};

Shared& share(const Problem& p, uint64_t serial) {
  thread_local std::vector<std::unique_ptr<Shared>> known;
  Shared* free = nullptr;
  for (const auto& shared : known) {
    if (shared->serial != serial) {
      free = shared.get();
    } else if (shared->heads == p.heads && shared->kv_heads == p.cache.heads && shared->head_dim == p.cache.head_dim &&
               shared->window == p.window) {
      return *shared;
    }
  }
  if (free == nullptr) free = known.emplace_back(std::make_unique<Shared>()).get();
  free->serial = serial;
  free->heads = p.heads;
  free->kv_heads = p.cache.heads;
  free->head_dim = p.cache.head_dim;
  free->window = p.window;
  free->plan = int4_fp8_attention::choose_plan(p);
  free->workspace = free->memory.get<uint8_t>(std::max<int64_t>(free->plan.workspace_bytes, 1));
  std::fill(free->workspace, free->workspace + free->plan.counter_bytes, uint8_t{0});
  return *free;
}

class Attention final : public Step {
 public:
  explicit Attention(Reader& reader) {
    heads_ = reader.integer("heads", 1, kMaxHeads);
    const int64_t kv_heads = reader.integer("kv_heads", 1, kMaxHeads);
    const int64_t head_dim = reader.integer("head_dim", 1, int4_fp8_attention::kMaxHeadDim);
    reader.check(heads_ % kv_heads == 0, heads_, " heads are not a multiple of ", kv_heads, " KV heads");
    reader.check(head_dim % 2 == 0, "head_dim ", head_dim, " is odd, rotary positions turn pairs");
    q_ = reader.slot("q", heads_ * head_dim);
    k_ = reader.slot("k", kv_heads * head_dim);
    v_ = reader.slot("v", kv_heads * head_dim);
    target_ = reader.slot("target", heads_ * head_dim);
    angles_ = reader.slot("angles", head_dim);
    cache_.format = static_cast<CacheFormat>(reader.integer("cache format", 0, 1));
    cache_.scale_type = static_cast<format::ScaleType>(reader.integer("scale type", 1, 2));
    cache_.heads = kv_heads;
    cache_.head_dim = head_dim;
    query_ = static_cast<Query>(reader.integer("query", 0, 1));
    scale_ = reader.real("scale");
    window_ = reader.integer("window", 1, int4_fp8_attention::kNoWindow);
    key_scales_ = reader.optional_floats("key scales", kv_heads * head_dim);
    query_scales_ = reader.optional_floats("query scales", kv_heads * head_dim);
  }

  void reserve(StateLayout& layout) override {
    const int64_t row = int4_fp8_attention::row_bytes(cache_.format, cache_.head_dim);
    const int64_t scales = int4_fp8_attention::scale_row_bytes(cache_.format, cache_.scale_type, cache_.head_dim);
    cache_.capacity = layout.capacity();
    // Products of 31-bit counts: the last factors are applied where an overflow is seen.
    const int64_t tokens = layout.sequences() * layout.capacity();
    const auto region = [&](int64_t bytes) { return layout.reserve_rows(tokens, cache_.heads * bytes); };
    k_at_ = region(row);
    v_at_ = region(row);
    k_scales_at_ = region(scales);
    v_scales_at_ = region(scales);
    cache_.data = int4_fp8_attention::dense(cache_.heads, cache_.capacity, row);
    cache_.scales = int4_fp8_attention::dense(cache_.heads, cache_.capacity, scales);
  }

  void begin(Call& call) override {
    rows_ = call.rows;
    uint8_t* state = call.state.data;
    const bool int4 = cache_.format == CacheFormat::kInt4;
    cache_.k = state + k_at_;
    cache_.v = state + v_at_;
    cache_.k_scales = int4 ? state + k_scales_at_ : nullptr;
    cache_.v_scales = int4 ? state + v_scales_at_ : nullptr;
    const Packed packed{call.state.header().sequences, call.cu_seqlens, call.lengths};
    append_ = {cache_, packed, nullptr, nullptr, k_.width, cache_.head_dim};
    problem_ = {
        .cache = cache_,
        .packed = packed,
        .q = nullptr,
        .q_token_stride = q_.width,
        .q_head_stride = cache_.head_dim,
        .heads = heads_,
        .scale = scale_,
        .causal = true,
        .window = window_,
        .query = query_,
        .out = nullptr,
        .out_token_stride = target_.width,
        .out_head_stride = cache_.head_dim,
        .workspace = nullptr,
    };
    Shared& shared = share(problem_, call.serial);
    problem_.workspace = shared.workspace;
    plan_ = &shared.plan;
    next_.restart(plan_->items, call.lanes);
  }

  void run(Call& call, const Lane& lane) override {
    place(call, lane);
    lane.sync();
    Problem problem = problem_;
    problem.q = call.slot(q_);
    problem.out = call.slot(target_);
    const auto items = int4_fp8_attention::kernels().items;
    for (int64_t item = next_.claim(lane); item != Dispenser::kNone; item = next_.claim(lane)) {
      items(problem, *plan_, item, item + 1);
    }
  }

 private:
  // A token's queries are one piece of work, its keys and values another: a single token keeps two lanes busy.
  void place(Call& call, const Lane& lane) const {
    Append append = append_;
    append.k = call.slot(k_);
    append.v = call.slot(v_);
    const auto append_tokens = int4_fp8_attention::kernels().append;
    const Lane::Range mine = lane.share(2 * rows_);
    for (int64_t piece = mine.first; piece < mine.last; ++piece) {
      const int64_t t = piece / 2;
      if (piece % 2 == 0) {
        rotate(call, t, call.slot_row(q_, t), heads_, query_scales_);
      } else {
        rotate(call, t, call.slot_row(k_, t), cache_.heads, key_scales_);
        append_tokens(append, t, t + 1);
      }
    }
  }

  void rotate(const Call& call, int64_t t, float* x, int64_t heads, const float* scales) const {
    const float* angles = call.slot_row(angles_, t);
    rope::kernel()({x, heads, cache_.head_dim, angles, angles + cache_.head_dim / 2, scales, heads / cache_.heads});
  }

  Dispenser next_;
  int64_t heads_;
  Slot q_, k_, v_, target_, angles_;
  Cache cache_{};
  Query query_;
  float scale_;
  int64_t window_;
  const float* key_scales_;     // S [H_kv, D] or null: keys times S ...
  const float* query_scales_;   // ... and queries times 1/S, after the rotation
  int64_t k_at_ = 0, v_at_ = 0, k_scales_at_ = 0, v_scales_at_ = 0;
  int64_t rows_ = 0;
  Append append_{};
  Problem problem_{};
  const Plan* plan_ = nullptr;
};

const RegisterRecord registered{
    {Kind::kAttention, "attention", [](Reader& r, StepArena& a) -> Step* { return a.make<Attention>(r); }}};

}  // namespace
}  // namespace tilewright::engine
