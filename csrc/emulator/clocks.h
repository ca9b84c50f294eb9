// SPDX-License-Identifier: Apache-2.0
// What happened before what (vector clocks). Each thread of a cluster counts its own releases; a clock says up to which count
// of every other thread a thread has been told. Barriers have a count too, for the copies that land on them.
//
// Clocks are shared and never change: threads that left a barrier together have the same one, and joining the same two
// again costs nothing.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace tilewright::emulator {

using Counts = std::vector<uint32_t>;
using Clock = std::shared_ptr<const Counts>;

// What has been released to a barrier and not yet been passed on.
class Gathering {
 public:
  void add(const Clock& clock, size_t components);
  void add(size_t component, uint32_t count, size_t components);
  Clock take();  // and be empty again

 private:
  Counts counts_;
  std::array<Clock, 4> joined_;  // lately: no need to join them again
  size_t next_ = 0;
};

// Both together. The last few results are remembered.
Clock join(const Clock& a, const Clock& b);
void forget_joins();

}  // namespace tilewright::emulator
