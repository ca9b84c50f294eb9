// SPDX-License-Identifier: Apache-2.0
#include "engine/state.h"

#include <algorithm>
#include <cstring>

#include "core/require.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kMaxCount = int64_t{1} << 31;
constexpr int64_t kMaxBytes = int64_t{1} << 46;

}  // namespace

StateLayout::StateLayout(int64_t sequences, int64_t capacity) : sequences_(sequences), capacity_(capacity) {
  require(sequences >= 1 && sequences < kMaxCount, "engine_state: sequences = ", sequences, ", needed 1 .. 2^31 - 1");
  require(capacity >= 1 && capacity < kMaxCount, "engine_state: max_length = ", capacity, ", needed 1 .. 2^31 - 1");
  bytes_ = static_cast<int64_t>(sizeof(StateHeader)) +
           round_up(sequences * static_cast<int64_t>(sizeof(int64_t)), kCacheLine);
}

int64_t StateLayout::reserve(int64_t bytes) {
  const int64_t at = bytes_;
  require(bytes >= 0 && bytes <= kMaxBytes - bytes_, "engine_state: ", sequences_, " sequences of ", capacity_,
          " tokens need more than 2^46 bytes; lower max_length or the batch");
  bytes_ += round_up(bytes, kCacheLine);
  return at;
}

int64_t StateLayout::reserve_rows(int64_t rows, int64_t bytes) {
  const auto wide = static_cast<__int128>(rows) * bytes;
  return reserve(wide > INT64_MAX ? INT64_MAX : static_cast<int64_t>(wide));
}

void truncate(const State& state, const int64_t* lengths, const char* op) {
  const StateHeader& header = state.header();
  for (int64_t s = 0; s < header.sequences; ++s) {
    const int64_t held = state.lengths()[s];
    require(lengths[s] >= 0 && lengths[s] <= held, op, ": lengths[", s, "] = ", lengths[s], ", needed 0 .. ", held,
            ", what sequence ", s, " holds");
    require(header.recurrent == 0 || lengths[s] == 0 || lengths[s] == held, op, ": lengths[", s, "] = ", lengths[s],
            ", but sequence ", s, " is summed up in a recurrent state of ", held,
            " tokens, which gives none back; keep all, reset to 0, or restore a copy of the state made earlier");
  }
  std::copy(lengths, lengths + header.sequences, state.lengths());
}

State open_state(uint8_t* data, int64_t bytes) {
  require(bytes >= static_cast<int64_t>(sizeof(StateHeader)), "engine: state has ", bytes,
          " bytes, fewer than the 64 of its header; allocate it with engine_state()");
  require(reinterpret_cast<uintptr_t>(data) % kCacheLine == 0,
          "engine: state does not start at a multiple of 64 bytes; pass the tensor of engine_state() itself");
  const State state{data, bytes};
  const StateHeader& header = state.header();
  require(std::memcmp(header.magic, StateHeader::kMagic, sizeof(header.magic)) == 0,
          "engine: state does not start with the state's magic; allocate it with engine_state()");
  require(header.version == StateHeader::kVersion, "engine: state has version ", header.version,
          ", this build reads version ", StateHeader::kVersion);
  const StateLayout least(header.sequences, header.capacity);
  require(header.bytes == bytes && least.bytes() <= bytes, "engine: state has ", bytes, " bytes, its header states ",
          header.bytes, " for ", header.sequences, " sequences of ", header.capacity, " tokens; it is damaged");
  for (int64_t s = 0; s < header.sequences; ++s) {
    require(state.lengths()[s] >= 0 && state.lengths()[s] <= header.capacity, "engine: state holds length ",
            state.lengths()[s], " for sequence ", s, ", outside 0..", header.capacity, "; it is damaged");
  }
  return state;
}

}  // namespace tilewright::engine
