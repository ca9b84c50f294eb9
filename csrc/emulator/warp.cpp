// SPDX-License-Identifier: Apache-2.0
// Instructions in which the lanes of a warp take part together.
#include <bit>
#include <cstring>

#include "emulator/cuda_names.h"
#include "emulator/state.h"

namespace tilewright::emulator {
namespace {

uint32_t full_mask(int warp) {
  const int lanes = machine->shape.threads - warp * 32;
  return lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1u;
}

// Two lanes that each wait for the other, but in different instructions.
void check_divergence(const Warp& warp, const char* name, uint32_t mask) {
  const uint32_t self = 1u << current->lane();
  for (const auto& other : warp.meetings) {
    if ((other->mask & self) == 0 || (other->arrived & mask) == 0) continue;
    kernel_error(
        "divergent warp: calls %s (mask %08x) while lanes %08x of its warp, whose mask %08x names it, are in %s", name,
        mask, other->arrived, other->mask, other->name);
  }
}

}  // namespace

int lane_id() { return current->lane(); }

uint32_t active_lanes() {
  const Unwatched inside;
  return full_mask(current->warp()) & ~this_block().warps[current->warp()].done;
}

void meet_warp(const char* name, uint32_t mask, void* lane_data, Finish finish) {
  const Unwatched inside;
  Warp& warp = this_block().warps[current->warp()];
  const uint32_t self = 1u << current->lane();
  mask &= full_mask(current->warp());
  if ((mask & self) == 0) kernel_error("calls %s with mask %08x, which lacks its own lane", name, mask);
  if ((mask & warp.done) != 0) {
    kernel_error("calls %s with mask %08x, but lanes %08x have returned from the kernel", name, mask, mask & warp.done);
  }
  Meeting* meeting = nullptr;
  for (const auto& open : warp.meetings) {
    if (open->mask == mask && std::strcmp(open->name, name) == 0 && (open->arrived & self) == 0) meeting = open.get();
  }
  if (meeting == nullptr) {
    check_divergence(warp, name, mask);
    warp.meetings.push_back(std::make_unique<Meeting>());
    meeting = warp.meetings.back().get();
    meeting->name = name;
    meeting->mask = mask;
  }
  meeting->arrived |= self;
  meeting->data[current->lane()] = lane_data;
  if (finish == nullptr) release(*current, meeting->released);  // only __syncwarp orders memory
  if (meeting->arrived != mask) {
    park(name, meeting);
    return;
  }
  const auto at =
      std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](const auto& open) { return open.get() == meeting; });
  const std::unique_ptr<Meeting> done = std::move(*at);
  warp.meetings.erase(at);
  if (finish != nullptr) finish(done->data.data(), mask);
  const Clock clock = finish == nullptr ? done->released.take() : nullptr;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    Fiber* lane = this_block().fibers[current->warp() * 32 + std::countr_zero(left)].get();
    if (clock != nullptr) acquire(*lane, clock);
    if (lane != current) wake(lane);
  }
}

void sync_warp(uint32_t mask) { meet_warp("__syncwarp", mask, nullptr, nullptr); }

void shuffle(const char* name, uint32_t mask, ShuffleLane& lane) {
  const Unwatched inside;
  meet_warp(name, mask, &lane, [](void* const* lanes, uint32_t present) {
    for (int l = 0; l < 32; ++l) {
      if (lanes[l] == nullptr) continue;
      auto& self = *static_cast<ShuffleLane*>(lanes[l]);
      if (self.from < 0 || self.from > 31 || ((present >> self.from) & 1u) == 0) {
        kernel_error("a shuffle: lane %d reads lane %d, which does not take part (mask %08x)", l, self.from, present);
      }
      self.out = static_cast<const ShuffleLane*>(lanes[self.from])->in;
    }
  });
}

uint32_t vote(const char* name, uint32_t mask, bool predicate) {
  const Unwatched inside;
  VoteLane lane{predicate ? 1 : 0, 0};
  meet_warp(name, mask, &lane, [](void* const* lanes, uint32_t) {
    uint32_t ballot = 0;
    for (int l = 0; l < 32; ++l) {
      if (lanes[l] != nullptr && static_cast<VoteLane*>(lanes[l])->predicate != 0) ballot |= 1u << l;
    }
    for (int l = 0; l < 32; ++l) {
      if (lanes[l] != nullptr) static_cast<VoteLane*>(lanes[l])->ballot = ballot;
    }
  });
  return lane.ballot;
}

namespace {

struct ReduceLane {
  uint32_t value;
  Reduction how;
  bool is_signed;
};

uint32_t combine(const ReduceLane& lane, uint32_t a, uint32_t b) {
  const bool less = lane.is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
  switch (lane.how) {
    case Reduction::kAdd: return a + b;
    case Reduction::kMin: return less ? a : b;
    case Reduction::kMax: return less ? b : a;
    case Reduction::kAnd: return a & b;
    case Reduction::kOr: return a | b;
    case Reduction::kXor: return a ^ b;
  }
  return 0;
}

}  // namespace

uint32_t reduce(const char* name, uint32_t mask, uint32_t value, Reduction how, bool is_signed) {
  const Unwatched inside;
  ReduceLane lane{value, how, is_signed};
  meet_warp(name, mask, &lane, [](void* const* lanes, uint32_t present) {
    const int first = std::countr_zero(present);
    ReduceLane sum = *static_cast<ReduceLane*>(lanes[first]);
    for (int l = first + 1; l < 32; ++l) {
      if (lanes[l] != nullptr) sum.value = combine(sum, sum.value, static_cast<ReduceLane*>(lanes[l])->value);
    }
    for (int l = 0; l < 32; ++l) {
      if (lanes[l] != nullptr) static_cast<ReduceLane*>(lanes[l])->value = sum.value;
    }
  });
  return lane.value;
}

// Every warp of the group must call it; here each lane notes the count, which must agree within the group.
void set_registers(int count, bool raise) {
  const Unwatched inside;
  meet_warp(raise ? "raise_registers" : "lower_registers", 0xffffffffu, nullptr, nullptr);
  Block& block = this_block();
  block.groups[current->thread / 128].registers = count;
  int64_t total = 0;
  for (const WarpGroup& group : block.groups) total += static_cast<int64_t>(group.registers) * 128;
  if (total > 65536) {
    kernel_error("setmaxnreg: the warpgroups of the block ask for %lld registers together; a multiprocessor has 65536",
                 static_cast<long long>(total));
  }
}

}  // namespace tilewright::emulator
