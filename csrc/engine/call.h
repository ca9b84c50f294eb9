// SPDX-License-Identifier: Apache-2.0
// One forward call as the steps see it: its tokens, the state, and the workspace.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/memory.h"
#include "core/team.h"
#include "engine/matrix.h"
#include "engine/program.h"
#include "engine/state.h"

namespace tilewright::engine {

struct Call {
  // T tokens of S sequences, packed: sequence s owns tokens cu_seqlens[s] .. cu_seqlens[s+1], possibly none.
  const int64_t* tokens;        // [T]
  int64_t token_count;          // T
  const int64_t* cu_seqlens;    // [S+1]
  const int64_t* lengths;       // [S], with the new tokens
  const int64_t* positions;     // [T]
  State state;

  bool all_logits;
  float* logits;                // [S or T, width]
  int64_t logits_width;

  int lanes;
  uint64_t serial;              // differs from call to call

  // While steps begin(): rows that the step at hand works on, T until only the sequences' last tokens are left.
  int64_t rows;
  int64_t shared_bytes = 0;     // the most that any step wants of the memory all lanes share ...
  int64_t lane_bytes = 0;       // ... and of each lane's own

  float* slots = nullptr;       // afterwards
  uint8_t* shared = nullptr;
  uint8_t* own = nullptr;

  float* slot(const Slot& s) const { return slots + s.offset * token_count; }
  float* slot_row(const Slot& s, int64_t row) const { return slot(s) + row * s.width; }
  uint8_t* own_memory(const Lane& lane) const { return own + lane.index * lane_bytes; }
  void want_shared(int64_t bytes) { shared_bytes = std::max(shared_bytes, round_up(bytes, kCacheLine)); }
  void want_own(int64_t bytes) { lane_bytes = std::max(lane_bytes, round_up(bytes, kCacheLine)); }
};

// Hands out independent items. Each lane has a share of neighbours, so that it reads its weights as one stream; when it
// is done it takes from the others, so that a lane which the system holds up does not hold up the rest.
class Dispenser {
 public:
  static constexpr int64_t kNone = -1;

  void restart(int64_t items, int lanes) {
    shares_ = std::min(lanes, kMaxShares);
    for (int64_t s = 0; s < shares_; ++s) {
      share_[s].next.store(items * s / shares_, std::memory_order_relaxed);
      share_[s].end = items * (s + 1) / shares_;
    }
  }

  int64_t claim(const Lane& lane) {
    for (int tried = 0; tried < shares_; ++tried) {
      Share& share = share_[(lane.index + tried) % shares_];
      // The plain look first: an empty share is left alone rather than counted up.
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
      const int64_t item = share.next.fetch_add(1, std::memory_order_relaxed);
      if (item < share.end) return item;
    }
    return kNone;
  }

 private:
  static constexpr int kMaxShares = 16;   // lanes beyond these start with another's share

  struct alignas(kCacheLine) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  Share share_[kMaxShares];
  int shares_ = 0;
};

// Columns [0, width) of a row that is about to be written. Rows of a slot lie a token apart, which hardware prefetchers do
// not follow.
inline constexpr int64_t kRowsAhead = 8;
inline void prefetch_columns(const float* row, int64_t width) {
  constexpr int kForWriting = 1;
  constexpr auto kFloatsPerLine = kCacheLine / static_cast<int64_t>(sizeof(float));
  for (int64_t n = 0; n < width; n += kFloatsPerLine) __builtin_prefetch(row + n, kForWriting);
}

// Regions of one piece of memory, each starting on a cache line.
class Carver {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = used_;
    used_ += round_up(bytes, kCacheLine);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

// The input of a linear step: a slot, optionally normalized, quantized for its matrices. A few tokens are prepared by
// every lane for itself, which costs less than a meeting; many are shared out.
class Preparation {
 public:
  void read(Reader& reader, const char* source);
  int64_t width() const { return source_.width; }

  // `carver` describes each lane's own memory; the caller may take more of it.
  void begin(Call& call, const Matrix& matrix, Carver& carver);
  // row_of[i]: the slot's row of prepared token i; null: i itself.
  Input run(Call& call, const Lane& lane, const Matrix& matrix, const int64_t* row_of = nullptr) const;

 private:
  Slot source_{};
  const float* norm_ = nullptr;   // [width] or null
  float eps_ = 0.0f;
  int64_t rows_ = 0;
  int64_t row_at_ = 0, codes_at_ = 0, scales_at_ = 0, sums_at_ = 0;
  bool own_ = false;
};

}  // namespace tilewright::engine
