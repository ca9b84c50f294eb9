// SPDX-License-Identifier: Apache-2.0
#include "ops/ternary_linear/cuda/plan.h"

#include <algorithm>
#include <sstream>

namespace tilewright::ternary_linear {
namespace {

using format::TernaryMma2;

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
      best = {.stream = {},
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
  constexpr int kTokenBytes = 8 * TernaryMma2::kColsPerChunk;
  constexpr int kRingBytes = weight_stream::kWarps * kStreamAhead * TernaryMma2::kBytesPerPanel;
  // Without columns the other kernel would have nothing to wait for; this one writes what sums of nothing become.
  const int64_t tokens = k == 0 ? std::min<int64_t>(m, weight_stream::kMostTokens) : m;
  const weight_stream::Cut cut =
      weight_stream::choose_cut({tokens, n, k, TernaryMma2::kBytesPerPanel, kTokenBytes, kRingBytes}, multiprocessors);
  if (!cut.fits) return large_plan(m, n, k, multiprocessors);
  DevicePlan plan{};
  plan.stream = cut;
  plan.splits = 1;
  return plan;
}

std::string describe(const DevicePlan& plan) {
  std::ostringstream text;
  if (plan.stream.fits) {
    text << "stream clusters=" << plan.stream.clusters << "x" << plan.stream.splits
         << " panels=" << plan.stream.panels_of_block << " blocks=" << plan.stream.blocks()
         << " shared=" << plan.stream.shared_bytes;
    return text.str();
  }
  text << "large rows=" << plan.tile_rows() << " tokens=" << plan.tile_tokens << " splits=" << plan.splits
       << " stages=" << large_stages(plan.tile_tokens, plan.subtiles);
  text << " tiles=" << plan.tiles() << " blocks=" << plan.blocks << " shared=" << plan.shared_bytes;
  return text.str();
}

}  // namespace tilewright::ternary_linear
