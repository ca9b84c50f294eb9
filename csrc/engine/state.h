// SPDX-License-Identifier: Apache-2.0
// The state arena: what a model remembers of S sequences of up to L tokens, allocated once.
//
//   header (64 bytes) | lengths int64 [S] | one region for each step that asked, in program order, 64-byte aligned
#pragma once

#include <cstdint>

#include "core/memory.h"

namespace tilewright::engine {

struct StateHeader {
  static constexpr char kMagic[8] = {'T', 'W', 'S', 'T', 'A', 'T', 'E', '\0'};
  static constexpr int64_t kVersion = 1;

  char magic[8];
  int64_t version;
  int64_t program;     // checksum of the program that the state belongs to
  int64_t sequences;   // S
  int64_t capacity;    // L
  int64_t bytes;       // of the whole arena
  int64_t recurrent;   // 1: tokens cannot be taken back, short of all of them
  int64_t reserved;
};
static_assert(sizeof(StateHeader) == 64);

class StateLayout {
 public:
  StateLayout(int64_t sequences, int64_t capacity);

  int64_t sequences() const { return sequences_; }
  int64_t capacity() const { return capacity_; }
  int64_t bytes() const { return bytes_; }
  // Byte offset of a fresh region.
  int64_t reserve(int64_t bytes);
  // The same for counts whose product may be more than can be had.
  int64_t reserve_rows(int64_t rows, int64_t bytes);

  // Some step keeps a summary of its tokens, not the tokens.
  void forbid_truncation() { recurrent_ = true; }
  bool recurrent() const { return recurrent_; }

 private:
  int64_t sequences_, capacity_, bytes_;
  bool recurrent_ = false;
};

// A state whose header has been checked.
struct State {
  uint8_t* data;
  int64_t bytes;

  const StateHeader& header() const { return *reinterpret_cast<const StateHeader*>(data); }
  int64_t* lengths() const { return reinterpret_cast<int64_t*>(data + sizeof(StateHeader)); }
};

// Cuts every sequence back to lengths[s] tokens; throws where that cannot be done, and then changes none.
void truncate(const State& state, const int64_t* lengths, const char* op);

// Throws unless the bytes are a state of this version with every length in 0..L.
State open_state(uint8_t* data, int64_t bytes);

}  // namespace tilewright::engine
