// SPDX-License-Identifier: Apache-2.0
// A persistent team of threads that run one function together (single program, multiple data) and meet at barriers.
// A decoded token needs some two hundred meetings; a meeting here costs a fraction of a microsecond, starting a parallel
// region costs several.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace tilewright {

// A meeting point of `size` threads. Arrivals spin, then yield, then sleep, so that a machine with fewer processors than
// threads still makes progress.
class Barrier {
 public:
  void reset(int size);

  // Everything written before by any thread of the team is visible to all after. Throws Abandoned when a member failed.
  void wait();
  void abandon();

  struct Abandoned {};

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> abandoned_{false};
  int size_ = 1;
  int spins_ = 0;
};

// One thread's place in the team.
struct Lane {
  int index;
  int count;
  Barrier* barrier;

  void sync() const {
    if (count > 1) barrier->wait();
  }

  struct Range {
    int64_t first, last;
  };
  // This lane's contiguous share of [0, n).
  Range share(int64_t n) const { return {n * index / count, n * (index + 1) / count}; }
};

// Calls body(context, lane) on `threads` threads, the calling one among them as lane 0, and returns when all are done.
// The first exception of any lane is rethrown here. Calls that come while the team is busy, from another thread or from
// inside a body, run on the calling thread alone; a body must give the same result at any thread count.
using TeamBody = void (*)(void* context, const Lane& lane);
void run_team(int threads, TeamBody body, void* context);

template <class Body>
void run_team(int threads, Body&& body) {
  run_team(
      threads, [](void* context, const Lane& lane) { (*static_cast<std::remove_reference_t<Body>*>(context))(lane); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

}  // namespace tilewright
