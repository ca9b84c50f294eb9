// SPDX-License-Identifier: Apache-2.0
// sparse_mlp: target += W_down h (+ bias), h = a * (up x), a = silu(gate x) where not |a| < threshold, else 0 (CATS,
// arXiv 2404.08763); x a slot, normalized and quantized once, h quantized once.
//
// For one token, where the image has both matrices by rows as well, the rows of up and of W_down^T that are not needed
// are not read. The bits are those of the dense form, which runs for all else.
#include <algorithm>

#include "engine/call.h"
#include "engine/sparse.h"
#include "ops/sparse_gated_mlp/kernels.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kChunksPerLane = 4;
constexpr int64_t kRowsTogether = 16;  // that a kernel takes at once

// Share of kept neurons above which all rows are read. Rows that lie apart come at the rate of memory's latency, all of
// them in sequence at that of its bandwidth: for short rows skipping pays late. Measured on Zen 4 (docs/methods/cats.md).
double dense_share(int64_t row_bytes) { return row_bytes < 512 ? 0.3 : row_bytes < 2048 ? 0.5 : 0.85; }
constexpr auto kFloat = static_cast<int64_t>(sizeof(float));

// A matrix, its bias, and who hands out its items.
struct Projection {
  Matrix* matrix;
  const float* bias;
  Dispenser next;

  int64_t first(int64_t item) const { return item * matrix->rows_per_item; }
  int64_t width(int64_t item) const { return std::min(matrix->rows_per_item, matrix->rows - first(item)); }
  // Rows of an item for all tokens, rows_per_item apart, with the bias.
  void run(const Input& input, int64_t tokens, int64_t item, float* out) const {
    const int64_t stride = matrix->rows_per_item;
    matrix->run(input, tokens, item, item + 1, out - first(item), stride);
    if (bias == nullptr) return;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < width(item); ++n) out[t * stride + n] += bias[first(item) + n];
    }
  }
};

class SparseMlp final : public Step {
 public:
  SparseMlp(Reader& reader, StepArena& arena) {
    source_.read(reader, "source");
    const Activation activation = read_activation(reader);
    target_ = reader.slot("target");
    inner_.read(reader, "inner");
    inner_slot_ = reader.slot("inner again", inner_.width());
    const int64_t thresholds = reader.integer("thresholds", 1, inner_.width());
    reader.check(thresholds == 1 || thresholds == inner_.width(), "has ", thresholds, " thresholds, needed 1 or ",
                 inner_.width());
    threshold_ = reader.floats("threshold", thresholds);
    threshold_stride_ = thresholds == 1 ? 0 : 1;
    read(reader, arena, gate_, "gate", activation, inner_.width(), source_.width());
    read(reader, arena, up_, "up", activation, inner_.width(), source_.width());
    read(reader, arena, down_, "down", activation, target_.width, inner_.width());
    reader.check(gate_.matrix->input == up_.matrix->input,
                 "gate and up need the same format, group and width, so that they share one input");
    if (reader.integer("sparse", 0, 1) == 1) {
      up_rows_ = read_sparse_rows(reader, arena, "up by rows", *up_.matrix);
      down_columns_ = read_sparse_columns(reader, arena, "down by columns", *down_.matrix);
    }
  }

  void begin(Call& call) override {
    rows_ = call.rows;
    for (Projection* one : {&gate_, &up_, &down_}) {
      one->matrix->plan(rows_);
      one->next.restart(one->matrix->items, call.lanes);
    }
    require(gate_.matrix->items == up_.matrix->items && gate_.matrix->rows_per_item == up_.matrix->rows_per_item,
            "engine: gate and up are planned differently; they must have one shape and format");
    sparse_ = rows_ == 1 && up_rows_ != nullptr;
    Carver own;
    source_.begin(call, *gate_.matrix, own);
    inner_.begin(call, *down_.matrix, own);
    const int64_t items = rows_ * kFloat;
    gate_at_ = own.take(items * gate_.matrix->rows_per_item);
    up_at_ = own.take(items * std::max(up_.matrix->rows_per_item, down_.matrix->rows_per_item));
    kept_at_ = own.take(rows_ * gate_.matrix->rows_per_item);
    if (sparse_) begin_sparse(call, own);
    call.want_own(own.used());
  }

  void run(Call& call, const Lane& lane) override {
    const Input input = source_.run(call, lane, *gate_.matrix);
    if (!sparse_) {
      run_gate_and_up(call, lane, input);
      lane.sync();
      run_down(call, lane, inner_.run(call, lane, *down_.matrix));
      return;
    }
    run_gate(call, lane, input);
    lane.sync();
    auto* list = own<int32_t>(call, lane, list_at_);
    const int64_t count = list_kept(call, list);
    const bool few =
        static_cast<double>(count) <= dense_share(up_rows_->row_bytes) * static_cast<double>(inner_.width());
    few ? run_up_rows(call, lane, input, list, count) : run_up(call, lane, input);
    lane.sync();
    const Input h = inner_.run(call, lane, *down_.matrix);
    few ? run_down_columns(call, lane, h) : run_down(call, lane, h);
  }

 private:
  static void read(Reader& reader, StepArena& arena, Projection& to, const char* name, Activation activation,
                   int64_t rows, int64_t columns) {
    to.matrix = read_matrix(reader, arena, name, activation, rows, columns);
    to.bias = reader.optional_floats("bias", rows);
  }

  template <class T>
  T* own(const Call& call, const Lane& lane, int64_t at) const {
    return reinterpret_cast<T*>(call.own_memory(lane) + at);
  }
  float* inner(const Call& call, int64_t t) const { return call.slot_row(inner_slot_, t); }

  void begin_sparse(Call& call, Carver& own) {
    const int64_t m = inner_.width();
    call.want_shared(m);  // what the token keeps
    list_at_ = own.take((m + 1) * static_cast<int64_t>(sizeof(int32_t)));
    chunks_ = kChunksPerLane * call.lanes;
    next_chunk_.restart(chunks_, call.lanes);
    out_at_ = own.take(round_up(ceil_div(m, chunks_), kRowsTogether) * kFloat);
    const int64_t units = ceil_div(target_.width, down_columns_->outputs_per_unit);
    // Long runs, since what lies in one is fetched together.
    const int64_t items = std::min<int64_t>(units, call.lanes == 1 ? 1 : 2 * call.lanes);
    outputs_ = ceil_div(units, items) * down_columns_->outputs_per_unit;
    next_output_.restart(ceil_div(target_.width, outputs_), call.lanes);
    columns_at_ = own.take(down_columns_->list_bytes);
    sum_at_ = own.take(outputs_ * kFloat);
    work_at_ = own.take(down_columns_->workspace_bytes(outputs_));
  }

  // a and what is kept of neurons [first, first + width) of token t, in place.
  void activate(int64_t first, int64_t width, float* gate, uint8_t* kept) const {
    sparse_gated_mlp::activate()(sparse_gated_mlp::Function::kSilu, gate, threshold_ + first * threshold_stride_,
                                 threshold_stride_, width, gate, kept);
  }

  void run_gate_and_up(Call& call, const Lane& lane, const Input& input) {
    auto* gate = own<float>(call, lane, gate_at_);
    auto* up = own<float>(call, lane, up_at_);
    auto* kept = own<uint8_t>(call, lane, kept_at_);
    for (int64_t item = gate_.next.claim(lane); item != Dispenser::kNone; item = gate_.next.claim(lane)) {
      const int64_t stride = gate_.matrix->rows_per_item, first = gate_.first(item), width = gate_.width(item);
      gate_.run(input, rows_, item, gate);
      up_.run(input, rows_, item, up);
      for (int64_t t = 0; t < rows_; ++t) {
        const float* u = up + t * stride;
        float* a = gate + t * stride;
        activate(first, width, a, kept);
        float* h = inner(call, t) + first;
        for (int64_t n = 0; n < width; ++n) h[n] = kept[n] ? a[n] * u[n] : 0.0f;
      }
    }
  }

  void run_down(Call& call, const Lane& lane, const Input& input) {
    auto* sums = own<float>(call, lane, up_at_);
    for (int64_t item = down_.next.claim(lane); item != Dispenser::kNone; item = down_.next.claim(lane)) {
      down_.run(input, rows_, item, sums);
      for (int64_t t = 0; t < rows_; ++t) {
        float* row = call.slot_row(target_, t) + down_.first(item);
        const float* sum = sums + t * down_.matrix->rows_per_item;
        for (int64_t n = 0; n < down_.width(item); ++n) row[n] += sum[n];
      }
    }
  }

  void run_gate(Call& call, const Lane& lane, const Input& input) {
    for (int64_t item = gate_.next.claim(lane); item != Dispenser::kNone; item = gate_.next.claim(lane)) {
      const int64_t first = gate_.first(item);
      float* a = inner(call, 0) + first;
      gate_.run(input, 1, item, a);
      activate(first, gate_.width(item), a, call.shared + first);
    }
  }

  int64_t list_kept(const Call& call, int32_t* list) const {
    int64_t count = 0;
    for (int64_t j = 0; j < inner_.width(); ++j) {
      list[count] = static_cast<int32_t>(j);
      count += call.shared[j];
    }
    return count;
  }

  void run_up_rows(Call& call, const Lane& lane, const Input& input, const int32_t* list, int64_t count) {
    auto* out = own<float>(call, lane, out_at_);
    float* h = inner(call, 0);
    const int64_t size = round_up(ceil_div(count, chunks_), kRowsTogether);
    for (int64_t chunk = next_chunk_.claim(lane); chunk != Dispenser::kNone; chunk = next_chunk_.claim(lane)) {
      const int64_t first = std::min(count, chunk * size), last = std::min(count, first + size);
      up_rows_->run(input, list + first, last - first, out);
      for (int64_t i = first; i < last; ++i) {
        const int64_t j = list[i];
        const float u = out[i - first];
        h[j] *= up_.bias == nullptr ? u : u + up_.bias[j];
      }
    }
  }

  void run_up(Call& call, const Lane& lane, const Input& input) {
    auto* up = own<float>(call, lane, up_at_);
    for (int64_t item = up_.next.claim(lane); item != Dispenser::kNone; item = up_.next.claim(lane)) {
      const int64_t first = up_.first(item), width = up_.width(item);
      up_.run(input, 1, item, up);
      float* h = inner(call, 0) + first;
      const uint8_t* kept = call.shared + first;
      for (int64_t n = 0; n < width; ++n) h[n] = kept[n] ? h[n] * up[n] : 0.0f;
    }
  }

  void run_down_columns(Call& call, const Lane& lane, const Input& h) {
    auto* columns = own<uint8_t>(call, lane, columns_at_);
    auto* sums = own<float>(call, lane, sum_at_);
    down_columns_->list(h, columns);
    for (int64_t item = next_output_.claim(lane); item != Dispenser::kNone; item = next_output_.claim(lane)) {
      const int64_t first = item * outputs_, last = std::min(target_.width, first + outputs_);
      down_columns_->run(h, columns, first, last, sums, own<uint8_t>(call, lane, work_at_));
      float* row = call.slot_row(target_, 0) + first;
      for (int64_t n = 0; n < last - first; ++n) {
        row[n] += down_.bias == nullptr ? sums[n] : sums[n] + down_.bias[first + n];
      }
    }
  }

  Preparation source_, inner_;
  Slot target_, inner_slot_;
  const float* threshold_;
  int64_t threshold_stride_;
  Projection gate_, up_, down_;
  SparseRows* up_rows_ = nullptr;
  SparseColumns* down_columns_ = nullptr;
  Dispenser next_chunk_, next_output_;
  bool sparse_ = false;
  int64_t rows_ = 0, chunks_ = 0, outputs_ = 0;
  int64_t gate_at_ = 0, up_at_ = 0, kept_at_ = 0, list_at_ = 0, out_at_ = 0, columns_at_ = 0, sum_at_ = 0, work_at_ = 0;
};

const RegisterRecord registered{
    {Kind::kSparseMlp, "sparse_mlp", [](Reader& r, StepArena& a) -> Step* { return a.make<SparseMlp>(r, a); }}};

}  // namespace
}  // namespace tilewright::engine
