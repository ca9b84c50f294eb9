// SPDX-License-Identifier: Apache-2.0
#include "engine/call.h"
#include "ops/rms_norm/kernels.h"

namespace tilewright::engine {
namespace {

// Preparing 2 tokens of a small model takes about as long as a meeting of the team.
constexpr int64_t kOwnTokens = 2;

}  // namespace

void Preparation::read(Reader& reader, const char* source) {
  source_ = reader.slot(source);
  norm_ = reader.optional_floats("norm", source_.width);
  eps_ = reader.real("eps");
  reader.check(eps_ >= 0.0f, "argument 'eps' is ", eps_, ", needed >= 0");
}

void Preparation::begin(Call& call, const Matrix& matrix, Carver& carver) {
  rows_ = call.rows;
  own_ = rows_ <= kOwnTokens;
  row_at_ = norm_ == nullptr ? 0 : carver.take(source_.width * static_cast<int64_t>(sizeof(float)));
  Carver shared;
  Carver& region = own_ ? carver : shared;
  codes_at_ = region.take(rows_ * matrix.code_bytes);
  scales_at_ = region.take(rows_ * matrix.scale_count * static_cast<int64_t>(sizeof(float)));
  sums_at_ = region.take(rows_ * matrix.sum_bytes);
  call.want_shared(shared.used());
}

Input Preparation::run(Call& call, const Lane& lane, const Matrix& matrix, const int64_t* row_of) const {
  uint8_t* base = own_ ? call.own_memory(lane) : call.shared;
  const Input input{base + codes_at_, reinterpret_cast<float*>(base + scales_at_), base + sums_at_};
  auto* normalized = reinterpret_cast<float*>(call.own_memory(lane) + row_at_);
  const Lane::Range mine = own_ ? Lane::Range{0, rows_} : lane.share(rows_);
  const auto normalize = rms_norm::kernel();
  for (int64_t t = mine.first; t < mine.last; ++t) {
    const float* x = call.slot_row(source_, row_of == nullptr ? t : row_of[t]);
    if (norm_ != nullptr) {
      normalize(x, norm_, source_.width, eps_, normalized);
      x = normalized;
    }
    matrix.prepare(x, input, t);
  }
  if (!own_) lane.sync();
  return input;
}

}  // namespace tilewright::engine
