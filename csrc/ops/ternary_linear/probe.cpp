// SPDX-License-Identifier: Apache-2.0
#include "ops/ternary_linear/probe.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "ops/ternary_linear/kernels.h"

namespace tilewright::ternary_linear {
namespace {

using format::TernaryPacking;

// Large enough to leave the second-level cache behind where the weight does; the rest of a larger one only repeats.
constexpr int64_t kMostRows = 1024;
constexpr int64_t kMostTokens = 64;
constexpr int kRounds = 7;
// The lookup serves one token at a time and q2 any number: it has to win clearly.
constexpr double kClearly = 0.95;

// Weights and activations of one value each: the kernels take the same path for all values.
struct Trial {
  Trial(TernaryPacking packing, int64_t n, int64_t k, int64_t m)
      : payload(static_cast<size_t>(format::ternary_payload_bytes(packing, n, k))),
        codes(static_cast<size_t>(m * round_up(k, kColsPerStep)), int8_t{1}),
        sums(static_cast<size_t>(m)),
        tables(packing == TernaryPacking::kT3w ? static_cast<size_t>(m * table_entries(k)) : 0),
        acc(static_cast<size_t>(m * n)) {
    problem = {{n, k, packing, payload.data()},
               m,
               codes.data(),
               round_up(k, kColsPerStep),
               sums.data(),
               tables.data(),
               acc.data(),
               n};
    format::ternary_clear(problem.weight, payload.data());
    plan = choose_plan(m, problem.weight);
  }

  void run(const Kernels& level) {
    const int64_t k = problem.weight.k;
    if (!tables.empty()) {
      for (int64_t m = 0; m < problem.m; ++m) {
        level.tables(codes.data() + m * problem.x_stride, k, tables.data() + m * table_entries(k));
      }
    }
    kernel_for(level, problem.weight.packing)(problem, plan, 0, plan.items);
  }

  std::vector<uint8_t> payload;
  std::vector<int8_t> codes;
  std::vector<int32_t> sums;
  std::vector<int16_t> tables;
  std::vector<int32_t> acc;
  Problem problem;
  Plan plan;
};

// The least of several rounds: other work only ever adds time.
double seconds(Trial& trial, const Kernels& level) {
  double least = 1e30;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    trial.run(level);
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return least;
}

int64_t class_of(int64_t size) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(size))); }

}  // namespace

TernaryPacking fastest_packing(int64_t n, int64_t k, int64_t tokens) {
  const Kernels& level = kernels();
  if (level.t3w == nullptr || n <= 0 || k <= 0 || tokens <= 0) return TernaryPacking::kQ2;
  static std::mutex mutex;
  static std::map<std::tuple<const Kernels*, int64_t, int64_t, int64_t>, TernaryPacking> known;
  const int64_t rows = std::min(kMostRows, class_of(n)), m = std::min(kMostTokens, class_of(tokens));
  const std::lock_guard lock(mutex);
  const auto [at, fresh] = known.try_emplace({&level, rows, class_of(k), m}, TernaryPacking::kQ2);
  if (fresh) {
    Trial dot(TernaryPacking::kQ2, rows, k, m), table(TernaryPacking::kT3w, rows, k, m);
    if (seconds(table, level) < kClearly * seconds(dot, level)) at->second = TernaryPacking::kT3w;
  }
  return at->second;
}

}  // namespace tilewright::ternary_linear
