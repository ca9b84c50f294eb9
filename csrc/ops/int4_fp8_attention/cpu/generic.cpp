// SPDX-License-Identifier: Apache-2.0
// Plain C++: always present, always correct. One row at a time: scores, their maximum, then the weighted sum of values.
#include <algorithm>
#include <cmath>
#include <limits>

#include "format/fp8.h"
#include "ops/int4_fp8_attention/cpu/append.h"
#include "ops/int4_fp8_attention/kernels.h"
#include "ops/int4_fp8_attention/partials.h"

namespace tilewright::int4_fp8_attention::generic {
namespace {

using format::Int4Kv;

constexpr float kFp8Limit = 448.0f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Generic {
  static float exp2_of(float x) { return std::exp2(x); }
};

// Decodes the row of K or V of one token.
void decode_row(const Cache& c, const uint8_t* data, const uint8_t* scales, const Item& item, int64_t token, float* x) {
  const uint8_t* row = data + item.sequence * c.data.sequence + item.kv_head * c.data.head + token * c.data.token;
  if (c.format == CacheFormat::kBFloat16) {
    for (int64_t d = 0; d < c.head_dim; ++d) {
      uint16_t bits = 0;
      std::memcpy(&bits, row + 2 * d, sizeof(bits));
      x[d] = format::bf16_to_float(bits);
    }
    return;
  }
  const uint8_t* scale =
      scales + item.sequence * c.scales.sequence + item.kv_head * c.scales.head + token * c.scales.token;
  for (int64_t d = 0; d < c.head_dim; ++d) {
    x[d] = static_cast<float>(Int4Kv::code(row, d)) * format::load_scale(scale, d / Int4Kv::kGroup, c.scale_type);
  }
}

// q as the scores use it; returns its scale.
float prepare_query(const Problem& p, const float* source, float* q) {
  const int64_t d = p.cache.head_dim;
  std::copy(source, source + d, q);
  if (p.query == Query::kFloat32) return 1.0f;
  float largest = 0.0f;
  for (int64_t i = 0; i < d; ++i) {
    if (!std::isfinite(q[i])) return std::nanf("");
    largest = std::max(largest, std::fabs(q[i]));
  }
  const float scale = largest / kFp8Limit > 0.0f ? largest / kFp8Limit : 1.0f;
  for (int64_t i = 0; i < d; ++i) q[i] = format::E4M3::round(q[i] / scale);
  return scale;
}

// One row against the keys [begin, end): writes sums[D]; sets the maximum and the total.
void attend(const Problem& p, const Item& item, int64_t row, Visible keys, float* buffer, float* sums, float& maximum,
            float& total) {
  const int64_t d = p.cache.head_dim;
  float* q = buffer;
  float* x = q + d;
  float* scores = x + d;
  const float factor = prepare_query(p, query_row(p, item, row), q) * p.scale * kLog2e;
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    decode_row(p.cache, p.cache.k, p.cache.k_scales, item, j, x);
    float dot = 0.0f;
    for (int64_t i = 0; i < d; ++i) dot += q[i] * x[i];
    scores[j - keys.begin] = dot * factor;
    maximum = std::max(maximum, scores[j - keys.begin]);
  }
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    decode_row(p.cache, p.cache.v, p.cache.v_scales, item, j, x);
    // As at every level: a value that is not finite makes the queries that see it NaN.
    const bool finite = std::all_of(x, x + d, [](float value) { return std::isfinite(value); });
    const float weight = finite ? std::exp2(scores[j - keys.begin] - maximum) : std::nanf("");
    for (int64_t i = 0; i < d; ++i) sums[i] += weight * x[i];
    total += weight;
  }
}

// One row against all keys of its item, chunk by chunk: writes its output, or its part of the one chunk.
void run_row(const Problem& p, const Item& item, int64_t row, float* buffer) {
  const int64_t d = p.cache.head_dim;
  float* chunk = buffer + 2 * d + kKeysPerChunk;
  Visible seen = visible_keys(p, item.first_position + row / p.group(), item.length);
  seen = {std::max(seen.begin, item.key_begin), std::min(seen.end, item.key_end)};
  const bool whole = item.chunks == 1;
  const Partial part = whole ? Partial{} : partial_of(p, item, item.chunk);
  float* sums = whole ? output_row(p, item, row) : part.sums + row * d;
  std::fill(sums, sums + d, 0.0f);
  Folded<Generic> folded;
  folded.maximum = kMinusInfinity;
  for (int64_t begin = seen.begin; begin < seen.end;) {
    const int64_t end = std::min(seen.end, (begin / kKeysPerChunk + 1) * kKeysPerChunk);
    float maximum = kMinusInfinity, total = 0.0f;
    std::fill(chunk, chunk + d, 0.0f);
    attend(p, item, row, {begin, end}, buffer, chunk, maximum, total);
    folded.add(d, chunk, maximum, total, sums);
    begin = end;
  }
  if (whole) {
    const float normalizer = folded.normalizer();
    for (int64_t i = 0; i < d; ++i) sums[i] *= normalizer;
  } else {
    part.maximum[row] = folded.maximum;
    part.total[row] = folded.total;
  }
}

void run_item(const Problem& p, const Item& item) {
  const int64_t floats = 3 * p.cache.head_dim + kKeysPerChunk;
  auto* buffer = reinterpret_cast<float*>(scratch(floats * static_cast<int64_t>(sizeof(float))));
  for (int64_t row = 0; row < item.rows(p.group()); ++row) run_row(p, item, row, buffer);
  if (item.chunks > 1) arrive<Generic>(p, item);
}

}  // namespace

void items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) run_item(p, item_at(p, plan, i));
}

void append(const Append& a, int64_t first, int64_t last) { Appender<Generic>::run(a, first, last); }

}  // namespace tilewright::int4_fp8_attention::generic
