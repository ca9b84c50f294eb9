// SPDX-License-Identifier: Apache-2.0
// What a record becomes: a step that every thread runs. A new kind of record is one file in records/ that registers
// itself here; the loop over steps knows none of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

#include "core/team.h"

namespace tilewright::engine {

struct Call;
class Reader;
class StateLayout;

// One record, parsed and checked. Trivially destructible: steps are laid out in an arena that is simply reused.
class Step {
 public:
  // Asks the state for its part, in program order; the same part for the same program, S and L.
  virtual void reserve(StateLayout&) {}
  // On the calling thread, before any thread runs: checks inputs, plans, claims workspace. May throw.
  virtual void begin(Call&) {}
  // On every thread. When it returns on all of them its results are complete; the loop does that last meeting.
  virtual void run(Call&, const Lane&) = 0;

 protected:
  ~Step() = default;
};

// Memory for the steps of one parse.
class StepArena {
 public:
  template <class T, class... Arguments>
  T* make(Arguments&&... arguments) {
    static_assert(std::is_trivially_destructible_v<T> && alignof(T) <= 64);
    return new (allocate(sizeof(T))) T(std::forward<Arguments>(arguments)...);
  }
  void clear() { block_ = used_ = 0; }

 private:
  void* allocate(size_t bytes);

  struct Block;
  size_t block_ = 0, used_ = 0;
};

using ParseRecord = Step* (*)(Reader&, StepArena&);

// Record kinds, as numbered in python/tilewright/models/image.py. Numbers are never reused.
enum class Kind : int64_t {
  kEmbed = 1,
  kAngles = 2,
  kLinear = 3,
  kGatedLinear = 4,
  kAttention = 5,
  kSelectLast = 6,
  kLogits = 7,
  kRotate = 8,
  kFeatureMap = 9,
  kWindowAttention = 10,
  kLinearAttention = 11,
  kSparseMlp = 12,
  kActivationMap = 13,
};

struct RecordKind {
  Kind kind;
  const char* name;
  ParseRecord parse;
};

// At namespace scope in the record's file.
struct RegisterRecord {
  explicit RegisterRecord(RecordKind kind);
};
const RecordKind* find_record(int64_t kind);

}  // namespace tilewright::engine
