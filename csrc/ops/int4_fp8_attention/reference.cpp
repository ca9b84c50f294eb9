// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_fp8_attention/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "format/fp8.h"

namespace tilewright::int4_fp8_attention {
namespace {

struct Row {
  int64_t sequence, kv_head, token;
};

double cached(const Cache& c, const uint8_t* data, const uint8_t* scales, const Row& at, int64_t d) {
  const uint8_t* row = data + at.sequence * c.data.sequence + at.kv_head * c.data.head + at.token * c.data.token;
  if (c.format == CacheFormat::kBFloat16) {
    uint16_t bits = 0;
    std::memcpy(&bits, row + 2 * d, sizeof(bits));
    return format::bf16_to_float(bits);
  }
  const uint8_t* scale =
      scales + at.sequence * c.scales.sequence + at.kv_head * c.scales.head + at.token * c.scales.token;
  return format::Int4Kv::code(row, d) *
         static_cast<double>(format::load_scale(scale, d / format::Int4Kv::kGroup, c.scale_type));
}

std::vector<double> query(const Problem& p, int64_t token, int64_t head) {
  constexpr float kFp8Limit = 448.0f;
  const float* source = p.q + token * p.q_token_stride + head * p.q_head_stride;
  std::vector<double> q(source, source + p.cache.head_dim);
  if (p.query == Query::kFloat32) return q;
  float largest = 0.0f;
  bool finite = true;
  for (int64_t d = 0; d < p.cache.head_dim; ++d) {
    finite = finite && std::isfinite(source[d]);
    largest = std::max(largest, std::fabs(source[d]));
  }
  const float ratio = largest / kFp8Limit;
  const float scale = ratio > 0.0f ? ratio : 1.0f;
  for (int64_t d = 0; d < p.cache.head_dim; ++d) {
    q[d] = finite ? static_cast<double>(format::E4M3::round(source[d] / scale)) * scale : std::nan("");
  }
  return q;
}

void attend(const Problem& p, int64_t sequence, int64_t token, int64_t head, double* out) {
  const Cache& c = p.cache;
  const int64_t length = p.packed.lengths[sequence];
  const int64_t position = length - (p.packed.cu_seqlens[sequence + 1] - token);
  const int64_t first = std::max<int64_t>(0, position - p.window + 1);
  const int64_t last = p.causal ? position + 1 : length;
  const std::vector<double> q = query(p, token, head);
  std::vector<double> weights;
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t j = first; j < last; ++j) {
    double dot = 0.0;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      dot += q[d] * cached(c, c.k, c.k_scales, {sequence, head / p.group(), j}, d);
    }
    weights.push_back(dot * p.scale);
    largest = std::max(largest, weights.back());
  }
  double total = 0.0;
  for (double& w : weights) total += w = std::exp(w - largest);
  for (int64_t d = 0; d < c.head_dim; ++d) {
    double sum = 0.0;
    for (int64_t j = first; j < last; ++j) {
      sum += weights[j - first] * cached(c, c.v, c.v_scales, {sequence, head / p.group(), j}, d);
    }
    out[d] = last > first ? sum / total : 0.0;
  }
}

}  // namespace

void reference(const Problem& p, double* out) {
  for (int64_t s = 0; s < p.packed.sequences; ++s) {
    for (int64_t t = p.packed.cu_seqlens[s]; t < p.packed.cu_seqlens[s + 1]; ++t) {
      for (int64_t h = 0; h < p.heads; ++h) attend(p, s, t, h, out + (t * p.heads + h) * p.cache.head_dim);
    }
  }
}

}  // namespace tilewright::int4_fp8_attention
