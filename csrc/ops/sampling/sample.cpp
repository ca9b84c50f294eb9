// SPDX-License-Identifier: Apache-2.0
#include "ops/sampling/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/require.h"
#include "isa/lanes.h"

namespace tilewright::sampling {
namespace {

using Candidate = Workspace::Candidate;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// exp_lanes holds down to here; a token e^87 times less probable than the best one is never drawn.
constexpr float kSmallestExponent = -87.0f;

bool more_probable(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.token < b.token);
}

// Largest logit; throws for NaN, +inf and when nothing is left to draw.
float checked_max(const float* logits, int64_t n) {
  Lanes largest = all_lanes(-kInfinity);
  IntLanes nan = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Lanes v = load_lanes(logits + i);
    nan |= v != v;
    largest = v > largest ? v : largest;
  }
  float result = -kInfinity;
  bool invalid = false;
  for (int i = 0; i < kLanes; ++i) {
    invalid = invalid || nan[i] != 0;
    result = std::max(result, largest[i]);
  }
  for (int64_t i = whole; i < n; ++i) {
    invalid = invalid || std::isnan(logits[i]);
    result = std::max(result, logits[i]);
  }
  require(!invalid && result != kInfinity,
          "sample: logits hold NaN or +inf; a weight or an activation of the model is not finite");
  require(result != -kInfinity, "sample: every logit is -inf, no token is left to draw; exclude fewer tokens");
  return result;
}

TILEWRIGHT_INLINE void weigh(const Lanes& logits, float largest, float temperature, Lanes* weights) {
  const Lanes exponent = (logits - largest) / temperature;
  *weights = exponent < kSmallestExponent ? Lanes{} : exp_lanes(exponent);
}

// weights[i] = e^((logits[i] - largest) / temperature), 0 where that is below e^-87.
void softmax_weights(const float* logits, int64_t n, float largest, float temperature, float* weights) {
  const int64_t whole = n - n % kLanes;
  Lanes lanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    weigh(load_lanes(logits + i), largest, temperature, &lanes);
    store_lanes(weights + i, lanes);
  }
  if (whole == n) return;
  weigh(load_first_lanes(logits + whole, n - whole), largest, temperature, &lanes);
  store_first_lanes(weights + whole, lanes, n - whole);
}

// Length of the shortest prefix (of candidates in falling order) whose weights reach p of the total.
size_t nucleus(const std::vector<Candidate>& sorted, double total, float p) {
  double sum = 0.0;
  for (size_t i = 0; i < sorted.size(); ++i) {
    sum += sorted[i].value;
    if (sum >= static_cast<double>(p) * total) return i + 1;
  }
  return sorted.size();
}

int64_t draw(const std::vector<Candidate>& candidates, size_t count, double u) {
  double total = 0.0;
  for (size_t i = 0; i < count; ++i) total += candidates[i].value;
  double left = u * total;
  int64_t last = candidates[0].token;
  for (size_t i = 0; i < count; ++i) {
    if (candidates[i].value == 0.0f) continue;
    last = candidates[i].token;
    left -= candidates[i].value;
    if (left < 0.0) break;
  }
  return last;
}

int64_t sample_top_k(const float* logits, int64_t n, float largest, const Options& o, Workspace& workspace) {
  auto& all = workspace.candidates;
  all.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) all[static_cast<size_t>(i)] = {logits[i], static_cast<int32_t>(i)};
  std::partial_sort(all.begin(), all.begin() + o.top_k, all.end(), more_probable);
  all.resize(static_cast<size_t>(o.top_k));
  auto& weights = workspace.weights;
  weights.resize(all.size());
  for (size_t i = 0; i < all.size(); ++i) weights[i] = all[i].value;
  softmax_weights(weights.data(), o.top_k, largest, o.temperature, weights.data());
  double total = 0.0;
  for (size_t i = 0; i < all.size(); ++i) total += all[i].value = weights[i];
  return draw(all, nucleus(all, total, o.top_p), uniform(o.seed, o.step));
}

int64_t sample_all(const float* logits, int64_t n, float largest, const Options& o, Workspace& workspace) {
  auto& weights = workspace.weights;
  weights.resize(static_cast<size_t>(n));
  softmax_weights(logits, n, largest, o.temperature, weights.data());
  auto& kept = workspace.candidates;
  kept.clear();
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += weights[static_cast<size_t>(i)];
  // Tokens below (1 - p) / n of the total add up to less than 1 - p of it, so none of them is in the nucleus. Half of
  // that leaves room for rounding in the sums.
  const double floor =
      o.top_p < 1.0f ? 0.5 * (1.0 - static_cast<double>(o.top_p)) / static_cast<double>(n) * total : 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const float weight = weights[static_cast<size_t>(i)];
    if (weight > 0.0f && weight >= floor) kept.push_back({weight, static_cast<int32_t>(i)});
  }
  if (o.top_p >= 1.0f) return draw(kept, kept.size(), uniform(o.seed, o.step));
  std::sort(kept.begin(), kept.end(), more_probable);
  return draw(kept, nucleus(kept, total, o.top_p), uniform(o.seed, o.step));
}

}  // namespace

void check(const Options& o) {
  require(std::isfinite(o.temperature) && o.temperature >= 0.0f, "sample: temperature = ", o.temperature,
          ", needed a number >= 0 (0 is greedy)");
  require(o.top_k >= 0, "sample: top_k = ", o.top_k, ", needed >= 0 (0 keeps all tokens)");
  require(o.top_p > 0.0f && o.top_p <= 1.0f, "sample: top_p = ", o.top_p, ", needed a number in (0, 1]");
}

double uniform(uint64_t seed, uint64_t step) {
  constexpr uint32_t kMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
  constexpr uint32_t kWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};
  constexpr int kRounds = 10;
  uint32_t counter[4] = {static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = uint64_t{kMultiplier[0]} * counter[0];
    const uint64_t b = uint64_t{kMultiplier[1]} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, counter);
    key[0] += kWeyl[0];
    key[1] += kWeyl[1];
  }
  const uint64_t bits = (uint64_t{counter[0]} << 32 | counter[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

int64_t sample(const float* logits, int64_t vocabulary, const Options& options, Workspace& workspace) {
  const float largest = checked_max(logits, vocabulary);
  if (options.temperature == 0.0f || options.top_k == 1) {
    return std::find(logits, logits + vocabulary, largest) - logits;
  }
  if (options.top_k > 0 && options.top_k < vocabulary) {
    return sample_top_k(logits, vocabulary, largest, options, workspace);
  }
  return sample_all(logits, vocabulary, largest, options, workspace);
}

}  // namespace tilewright::sampling
