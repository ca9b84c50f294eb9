// SPDX-License-Identifier: Apache-2.0
// A model as the engine reads it: a program of records over one arena of weights and one arena of state.
//
// program  int64 words: header | slots (offset, width) | records (kind, argument count, arguments...)
//   header  magic, version, words, checksum, weight bytes, slots, records, logits width
//   slot    one float matrix [tokens, width] of the workspace; offset and width count floats of one token, and slots
//           whose values are not alive together may overlap
//   floats among the arguments are the bits of a float64; byte offsets count from the start of the weights
//
// Everything a record says is checked against slots and arenas before anything runs: a damaged image is an error.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "core/require.h"
#include "engine/step.h"

namespace tilewright::engine {

inline constexpr int64_t kMagic = 0x454e49474e455754;   // "TWENGINE"
inline constexpr int64_t kVersion = 2;

enum Header : int64_t {
  kMagicAt,
  kVersionAt,
  kWordsAt,
  kChecksumAt,
  kWeightBytesAt,
  kSlotsAt,
  kRecordsAt,
  kLogitsAt,
  kHeaderWords,
};

struct Words {
  const int64_t* data;
  int64_t count;
};

struct Arena {
  const uint8_t* data;
  int64_t bytes;
};

struct Slot {
  int64_t offset, width;
};

// FNV-1a over all words but the checksum itself.
int64_t checksum(Words program);

// Reads one record's arguments in order; each getter names the argument in its error.
class Reader {
 public:
  Reader(Words arguments, const std::vector<Slot>& slots, Arena weights, int64_t index, const char* kind)
      : arguments_(arguments), slots_(slots), weights_(weights), index_(index), kind_(kind) {}

  int64_t integer(const char* name, int64_t least, int64_t most);
  float real(const char* name);
  Slot slot(const char* name, int64_t width = kAnyWidth);
  // kAbsent gives width 0.
  Slot optional_slot(const char* name, int64_t width = kAnyWidth);
  // Floats or a packed blob in the weights. kAbsent gives null.
  const float* floats(const char* name, int64_t count);
  const float* optional_floats(const char* name, int64_t count);
  Arena blob(const char* name);
  void finish() const;

  // Refuses the record for a reason of its own.
  template <class... Parts>
  void check(bool holds, const Parts&... parts) const {
    if (!holds) fail("engine: record ", index_, " (", kind_, "): ", parts..., "; compile the model again");
  }
  const char* kind() const { return kind_; }

  static constexpr int64_t kAnyWidth = -1;
  static constexpr int64_t kAbsent = -1;

 private:
  int64_t next(const char* name);

  Words arguments_;
  const std::vector<Slot>& slots_;
  Arena weights_;
  int64_t index_;
  const char* kind_;
  int64_t at_ = 0;
};

// A parsed program. Its steps live in memory that the next parse on the same thread reuses.
struct Program {
  std::vector<Slot> slots;
  std::vector<Step*> steps;
  int64_t floats_per_token;   // of all slots
  int64_t logits;             // width of a row of logits
  int64_t checksum;
};

void parse(Words program, Arena weights, Program& out);

}  // namespace tilewright::engine
