// SPDX-License-Identifier: Apache-2.0
#include "core/team.h"

#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <system_error>
#include <thread>

namespace tilewright {
namespace {

// Of the order of the longest imbalance between lanes of one record; then the processor is offered to others.
constexpr int kSpins = 4000;
constexpr int kCrowdedSpins = 50;   // more threads than processors: whoever is waited for needs this one
constexpr int kYields = 64;
// Between two calls a worker spins about as long as a caller needs to come back with the next token, then sleeps.
constexpr int kIdleSpins = 2000;
constexpr uint32_t kCallStep = 1024;   // a call word is number * kCallStep + threads
constexpr int kMaxThreads = kCallStep - 1;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until value != seen. Returns without a system call when that happens soon.
void wait_change(const std::atomic<uint32_t>& value, uint32_t seen, std::atomic<int>& sleepers, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != seen) return;
    pause();
  }
  for (int i = 0; i < kYields; ++i) {
    if (value.load(std::memory_order_acquire) != seen) return;
    std::this_thread::yield();
  }
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  while (value.load(std::memory_order_seq_cst) == seen) value.wait(seen, std::memory_order_seq_cst);
  sleepers.fetch_sub(1, std::memory_order_relaxed);
}

class Team {
 public:
  bool try_enter() { return !busy_.test_and_set(std::memory_order_acquire); }
  void leave() { busy_.clear(std::memory_order_release); }

  void run(int wanted, TeamBody body, void* context) {
    const int threads = std::min(wanted, grow(wanted - 1) + 1);
    body_ = body;
    context_ = context;
    error_ = nullptr;
    barrier_.reset(threads);
    pending_.store(threads - 1, std::memory_order_relaxed);
    const uint32_t call = call_.load(std::memory_order_relaxed) / kCallStep + 1;
    call_.store(call * kCallStep + static_cast<uint32_t>(threads), std::memory_order_seq_cst);
    if (idle_sleepers_.load(std::memory_order_seq_cst) > 0) call_.notify_all();
    work(0, threads);
    for (int i = 0; pending_.load(std::memory_order_acquire) != 0; ++i) {
      if (i < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // Number of workers there are, `wanted` unless the system refuses more threads.
  int grow(int wanted) {
    try {
      while (workers_ < wanted) {
        std::thread([this, index = workers_ + 1, seen = call_.load()] { serve(index, seen); }).detach();
        ++workers_;
      }
    } catch (const std::system_error&) {
      return workers_;
    }
    return std::min(workers_, wanted);
  }

  void serve(int index, uint32_t seen) {
    for (;;) {
      wait_change(call_, seen, idle_sleepers_, kIdleSpins);
      seen = call_.load(std::memory_order_acquire);
      // Number and size of a call are one word: who is not part of a call reads nothing else of it.
      const int threads = static_cast<int>(seen % kCallStep);
      if (index >= threads) continue;
      work(index, threads);
      pending_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  void work(int index, int threads) {
    try {
      body_(context_, Lane{index, threads, &barrier_});
    } catch (const Barrier::Abandoned&) {
      return;
    } catch (...) {
      const std::lock_guard<std::mutex> guard(error_mutex_);
      if (!error_) error_ = std::current_exception();
      barrier_.abandon();
    }
  }

  Barrier barrier_;
  alignas(64) std::atomic<uint32_t> call_{0};
  std::atomic<int> idle_sleepers_{0};
  alignas(64) std::atomic<int> pending_{0};
  std::atomic_flag busy_;
  TeamBody body_ = nullptr;
  void* context_ = nullptr;
  int workers_ = 0;
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

// Threads do not survive fork(): a child starts a team of its own. No team is ever destroyed, since its threads may
// outlive static destruction.
Team& team() {
  static std::atomic<Team*> current{new Team};
  static std::atomic<pid_t> owner{getpid()};
  pid_t known = owner.load(std::memory_order_acquire);
  const pid_t self = getpid();
  if (known != self && owner.compare_exchange_strong(known, self)) current.store(new Team);
  return *current.load(std::memory_order_acquire);
}

}  // namespace

void Barrier::reset(int size) {
  static const int processors = static_cast<int>(std::thread::hardware_concurrency());
  spins_ = size <= processors ? kSpins : kCrowdedSpins;
  size_ = size;
  arrived_.store(0, std::memory_order_relaxed);
  abandoned_.store(false, std::memory_order_relaxed);
}

void Barrier::wait() {
  // The phase is read before the flag: a member that fails later changes the phase that is waited for.
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (abandoned_.load(std::memory_order_acquire)) throw Abandoned{};
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) phase_.notify_all();
  } else {
    wait_change(phase_, phase, sleepers_, spins_);
  }
  if (abandoned_.load(std::memory_order_acquire)) throw Abandoned{};
}

void Barrier::abandon() {
  abandoned_.store(true, std::memory_order_seq_cst);
  phase_.fetch_add(1, std::memory_order_seq_cst);
  phase_.notify_all();
}

void run_team(int threads, TeamBody body, void* context) {
  if (threads > 1) {
    Team& shared = team();
    if (shared.try_enter()) {
      struct Leave {
        Team& entered;
        ~Leave() { entered.leave(); }
      } leave{shared};
      shared.run(std::min(threads, kMaxThreads), body, context);
      return;
    }
  }
  Barrier alone;
  body(context, Lane{0, 1, &alone});
}

}  // namespace tilewright
