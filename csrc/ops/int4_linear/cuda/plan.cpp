// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_linear/cuda/plan.h"

#include <sstream>

namespace tilewright::int4_linear {

std::string describe(const DevicePlan& plan) {
  std::ostringstream text;
  if (plan.stream.fits) {
    text << "streams clusters=" << plan.stream.clusters << "x" << plan.stream.splits
         << " panels=" << plan.stream.panels_of_block << " shared_bytes=" << plan.stream.shared_bytes;
    return text.str();
  }
  text << "form=" << static_cast<int>(plan.form) << " fine=" << plan.fine
       << " tile=" << plan.blocks_of_tile() * format::Int4Hopper::kRows << "x" << plan.token_tile
       << " tiles=" << plan.work.tiles << " cluster=" << plan.cluster() << " split_tiles=" << plan.work.split_tiles
       << " blocks=" << plan.work.blocks << " stages=" << plan.stages << " shared_bytes=" << plan.shared_bytes;
  return text.str();
}

}  // namespace tilewright::int4_linear
