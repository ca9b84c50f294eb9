// SPDX-License-Identifier: Apache-2.0
#include "ops/ternary_linear/cuda/plan.h"

#include <algorithm>
#include <sstream>

namespace tilewright::ternary_linear {
namespace {

using format::TernaryMma2;

int small_shared_bytes(int64_t m, int64_t k) {
  const int64_t groups = m <= 8 ? 1 : 2;
  const int64_t chunks = std::min<int64_t>(TernaryMma2::chunks(k), kSmallPhaseChunks / groups);
  return static_cast<int>(kSmallHeaderBytes + chunks * TernaryMma2::kColsPerChunk * 8 * groups);
}

// Largest cluster that every CUDA device of this kind takes; fewer blocks than that have no common traffic to save.
constexpr int kMostCluster = 8;
constexpr int kSmallBlocks = 2;   // that a multiprocessor has room for

DevicePlan small_plan(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  DevicePlan plan{};
  plan.small = true;
  plan.splits = 1;
  // As few rows a block as leave all blocks on the device at once.
  plan.panels = 1;
  while (plan.panels < kSmallWarps &&
         ceil_div(n, TernaryMma2::kRowsPerPanel * plan.panels) > kSmallBlocks * multiprocessors) {
    plan.panels *= 2;
  }
  plan.row_tiles = ceil_div(n, TernaryMma2::kRowsPerPanel * plan.panels);
  plan.cluster = 1;
  while (plan.cluster < kMostCluster && plan.cluster * 2 <= plan.row_tiles) plan.cluster *= 2;
  plan.token_tiles = 1;
  plan.blocks = round_up(plan.row_tiles, plan.cluster);
  plan.shared_bytes = small_shared_bytes(std::min<int64_t>(m, kMostSmallTokens), k);
  return plan;
}

struct Shape {
  int tokens, subtiles;
};
constexpr Shape kShapes[] = {{32, 1}, {64, 1}, {128, 1}, {128, 2}};

// Clocks of one multiprocessor, roughly: the tensor cores take 4096 products a clock, a stage's bytes come at 32 a clock,
// and an item costs a fixed time besides, more if sums of other blocks are to be read.
double large_cost(const Shape& shape, int64_t tiles, int64_t chunks, int splits, int multiprocessors) {
  const double products = 128.0 * shape.subtiles * shape.tokens * 128.0 / 4096.0;
  const double stage = std::max(products, large_stage_bytes(shape.tokens, shape.subtiles) / 32.0);
  const double outputs = 128.0 * shape.subtiles * shape.tokens;
  const double item = 1500.0 + outputs / 16.0 + (splits > 1 ? 2000.0 + outputs * splits / 16.0 : 0.0);
  const auto waves = static_cast<double>(ceil_div(tiles * splits, multiprocessors));
  return waves * (static_cast<double>(ceil_div(chunks, splits)) * stage + item);
}

DevicePlan large_plan(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  const int64_t chunks = TernaryMma2::chunks(k);
  const auto least = static_cast<int>(std::max<int64_t>(1, ceil_div(k, TernaryMma2::kMaxColsPerSum)));
  DevicePlan best{};
  double best_cost = 0.0;
  for (const Shape& shape : kShapes) {
    const int64_t row_tiles = ceil_div(n, 128 * shape.subtiles), token_tiles = ceil_div(m, shape.tokens);
    for (int splits = least; splits <= std::max<int64_t>(least, std::min<int64_t>(8, chunks / 4)); ++splits) {
      const double cost = large_cost(shape, row_tiles * token_tiles, chunks, splits, multiprocessors);
      if (best.blocks != 0 && cost >= best_cost) continue;
      best_cost = cost;
      best = {.small = false,
              .panels = 0,
              .cluster = 1,
              .tile_tokens = shape.tokens,
              .subtiles = shape.subtiles,
              .splits = splits,
              .row_tiles = row_tiles,
              .token_tiles = token_tiles,
              .blocks = std::min<int64_t>(multiprocessors, row_tiles * token_tiles * splits),
              .shared_bytes =
                  1024 + large_stages(shape.tokens, shape.subtiles) * large_stage_bytes(shape.tokens, shape.subtiles)};
    }
  }
  return best;
}

}  // namespace

DevicePlan choose_device_plan(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  // Without columns there is nothing to copy; the small kernel then writes what zero sums become.
  return m <= kMostSmallTokens || k == 0 ? small_plan(m, n, k, multiprocessors) : large_plan(m, n, k, multiprocessors);
}

std::string describe(const DevicePlan& plan) {
  std::ostringstream text;
  if (plan.small) {
    text << "small rows=" << plan.panels * TernaryMma2::kRowsPerPanel << " cluster=" << plan.cluster;
  } else {
    text << "large rows=" << plan.tile_rows() << " tokens=" << plan.tile_tokens << " splits=" << plan.splits
         << " stages=" << large_stages(plan.tile_tokens, plan.subtiles);
  }
  text << " tiles=" << plan.tiles() << " blocks=" << plan.blocks << " shared=" << plan.shared_bytes;
  return text.str();
}

}  // namespace tilewright::ternary_linear
