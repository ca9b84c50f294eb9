// SPDX-License-Identifier: Apache-2.0
#include "engine/engine.h"

#include <atomic>
#include <cstring>
#include <new>

#include "core/require.h"
#include "engine/call.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kMaxWorkspace = int64_t{1} << 42;

// What a calling thread keeps from one call to the next, so that decoding allocates nothing.
struct Workspace {
  Program program;
  std::vector<int64_t> lengths, positions;
  Scratch slots, shared, own;
};

Workspace& workspace() {
  thread_local Workspace mine;
  return mine;
}

StateLayout layout_of(const Program& program, int64_t sequences, int64_t capacity) {
  StateLayout layout(sequences, capacity);
  for (Step* step : program.steps) step->reserve(layout);
  return layout;
}

void check_state(const Program& program, const State& state) {
  const StateHeader& header = state.header();
  require(header.program == program.checksum,
          "engine: state belongs to another program; allocate one with engine_state() for this model");
  const StateLayout layout = layout_of(program, header.sequences, header.capacity);
  const int64_t needed = layout.bytes();
  require(state.bytes == needed, "engine: state has ", state.bytes, " bytes, ", header.sequences, " sequences of ",
          header.capacity, " tokens need ", needed, "; it is damaged");
  require(header.recurrent == (layout.recurrent() ? 1 : 0), "engine: state says ", header.recurrent,
          " for whether it is recurrent, the program the opposite; it is damaged");
}

// cu_seqlens against T and S, lengths against L; fills the lengths and positions after this batch.
void place_tokens(const Batch& batch, const State& state, Workspace& w) {
  const StateHeader& header = state.header();
  require(batch.sequences == header.sequences, "engine: cu_seqlens describes ", batch.sequences,
          " sequences, the state holds ", header.sequences, "; give every sequence an entry, an empty one if need be");
  const int64_t* cu = batch.cu_seqlens;
  require(cu[0] == 0 && cu[batch.sequences] == batch.token_count, "engine: cu_seqlens runs from ", cu[0], " to ",
          cu[batch.sequences], ", needed 0 to the number of tokens, ", batch.token_count);
  w.lengths.resize(static_cast<size_t>(batch.sequences));
  w.positions.resize(static_cast<size_t>(batch.token_count));
  for (int64_t s = 0; s < batch.sequences; ++s) {
    require(cu[s] <= cu[s + 1] && cu[s + 1] <= batch.token_count, "engine: cu_seqlens falls from ", cu[s], " to ",
            cu[s + 1], " at sequence ", s, "; it must never fall nor pass the number of tokens, ", batch.token_count);
    const int64_t held = state.lengths()[s];
    const int64_t added = cu[s + 1] - cu[s];
    require(added <= header.capacity - held, "engine: sequence ", s, " holds ", held, " tokens and ", added,
            " more exceed the state's max_length ", header.capacity,
            "; shorten the prompt, reset the sequence, or allocate the state with a larger max_length");
    w.lengths[static_cast<size_t>(s)] = held + added;
    for (int64_t i = 0; i < added; ++i) w.positions[static_cast<size_t>(cu[s] + i)] = held + i;
  }
}

void allocate(const Program& program, Call& call, Workspace& w) {
  const int64_t floats = program.floats_per_token * call.token_count;
  require(floats <= kMaxWorkspace && call.lane_bytes <= kMaxWorkspace / call.lanes, "engine: ", call.token_count,
          " tokens at once need more workspace than can be addressed; pass fewer in one call");
  try {
    call.slots = w.slots.get<float>(std::max<int64_t>(floats, 1));
    call.shared = w.shared.get<uint8_t>(std::max<int64_t>(call.shared_bytes, 1));
    call.own = w.own.get<uint8_t>(std::max<int64_t>(call.lane_bytes * call.lanes, 1));
  } catch (const std::bad_alloc&) {
    fail("engine: ", call.token_count, " tokens at once need a workspace of ",
         floats * static_cast<int64_t>(sizeof(float)) + call.shared_bytes + call.lane_bytes * call.lanes,
         " bytes, which this machine does not give; pass fewer in one call");
  }
}

}  // namespace

int64_t state_bytes(Words program, Arena weights, int64_t sequences, int64_t capacity) {
  parse(program, weights, workspace().program);
  return layout_of(workspace().program, sequences, capacity).bytes();
}

void format_state(Words program, Arena weights, int64_t sequences, int64_t capacity, uint8_t* data, int64_t bytes) {
  require(bytes == state_bytes(program, weights, sequences, capacity), "engine_state: ", bytes,
          " bytes given, not what the program needs");
  StateHeader header{};
  std::memcpy(header.magic, StateHeader::kMagic, sizeof(header.magic));
  header.version = StateHeader::kVersion;
  header.program = workspace().program.checksum;
  header.sequences = sequences;
  header.capacity = capacity;
  header.bytes = bytes;
  header.recurrent = layout_of(workspace().program, sequences, capacity).recurrent() ? 1 : 0;
  std::memcpy(data, &header, sizeof(header));
  std::memset(data + sizeof(header), 0, static_cast<size_t>(sequences) * sizeof(int64_t));
}

int64_t logits_width(Words program) {
  constexpr int64_t kMaxWidth = int64_t{1} << 31;
  require(
      program.count >= kHeaderWords && program.data[kMagicAt] == kMagic,
      "engine: program does not start with the engine's header; pass ModelImage.program of tilewright.models.image");
  const int64_t width = program.data[kLogitsAt];
  require(width > 0 && width < kMaxWidth, "engine: program states logits of width ", width, "; it is damaged");
  return width;
}

void forward(Words program, Arena weights, State state, const Batch& batch, int threads, float* logits) {
  static std::atomic<uint64_t> serial{0};
  Workspace& w = workspace();
  parse(program, weights, w.program);
  check_state(w.program, state);
  place_tokens(batch, state, w);
  if (batch.token_count == 0) {
    if (!batch.all_logits) std::fill(logits, logits + batch.sequences * w.program.logits, 0.0f);
    return;
  }
  Call call{
      .tokens = batch.tokens,
      .token_count = batch.token_count,
      .cu_seqlens = batch.cu_seqlens,
      .lengths = w.lengths.data(),
      .positions = w.positions.data(),
      .state = state,
      .all_logits = batch.all_logits,
      .logits = logits,
      .logits_width = w.program.logits,
      .lanes = std::max(threads, 1),
      .serial = ++serial,
      .rows = batch.token_count,
  };
  for (Step* step : w.program.steps) step->begin(call);
  allocate(w.program, call, w);
  run_team(call.lanes, [&](const Lane& lane) {
    for (Step* step : w.program.steps) {
      step->run(call, lane);
      lane.sync();
    }
  });
  std::copy(w.lengths.begin(), w.lengths.end(), state.lengths());
}

}  // namespace tilewright::engine
