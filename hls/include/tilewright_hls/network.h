// SPDX-License-Identifier: Apache-2.0
// Runs the processes of a dataflow region concurrently for a C simulation: one at a time, switched only where a stream
// makes one wait, in an order drawn from a seed. A state in which all wait is a deadlock, reported with who waits for what.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace tilewright_hls {

struct Deadlock : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Network {
 public:
  explicit Network(std::uint64_t seed = 0) : random_(seed * 2 + 1) {}

  void add(std::string name, std::function<void()> body) {
    processes_.push_back(std::make_unique<Process>());
    processes_.back()->name = std::move(name);
    processes_.back()->body = std::move(body);
  }

  // Until all have returned. Rethrows what a process threw; a deadlock is a Deadlock.
  void run() {
    for (auto& process : processes_) process->thread = std::thread([this, p = process.get()] { enter(*p); });
    std::string stuck;
    for (;;) {
      Process* next = choose();
      if (next == nullptr) break;
      give(*next);
      if (failure_) break;
    }
    for (const auto& process : processes_) {
      if (!process->done && !failure_) stuck += (stuck.empty() ? "" : "; ") + process->name + " " + process->waits_for;
    }
    cancelled_ = true;
    for (auto& process : processes_) {
      if (!process->done) give(*process);
      process->thread.join();
    }
    processes_.clear();
    if (failure_) std::rethrow_exception(failure_);
    if (!stuck.empty()) throw Deadlock("deadlock: " + stuck);
  }

  // The network whose process the calling thread is, or null.
  static Network*& current() {
    thread_local Network* network = nullptr;
    return network;
  }

  // Called by a process: back when `ready` holds.
  void wait(std::function<bool()> ready, const std::string& reason) {
    while (!ready()) {
      Process& self = *self_();
      self.ready = ready;
      self.waits_for = reason;
      std::unique_lock lock(mutex_);
      self.running = false;
      changed_.notify_all();
      changed_.wait(lock, [&] { return self.running; });
      if (cancelled_) throw Cancelled();
      self.ready = nullptr;
    }
  }

 private:
  struct Cancelled {};
  struct Process {
    std::string name, waits_for;
    std::function<void()> body;
    std::function<bool()> ready;
    std::thread thread;
    bool running = false, done = false;
  };

  static Process*& self_() {
    thread_local Process* self = nullptr;
    return self;
  }

  void enter(Process& process) {
    self_() = &process;
    current() = this;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return process.running; });
    }
    try {
      if (!cancelled_) process.body();
    } catch (const Cancelled&) {
    } catch (...) {
      if (!failure_) failure_ = std::current_exception();
    }
    std::unique_lock lock(mutex_);
    process.done = true;
    process.running = false;
    changed_.notify_all();
  }

  void give(Process& process) {
    std::unique_lock lock(mutex_);
    process.running = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return !process.running; });
  }

  Process* choose() {
    std::vector<Process*> able;
    for (auto& process : processes_) {
      if (!process->done && (!process->ready || process->ready())) able.push_back(process.get());
    }
    if (able.empty()) return nullptr;
    random_ = random_ * 6364136223846793005ULL + 1442695040888963407ULL;
    return able[(random_ >> 33) % able.size()];
  }

  std::vector<std::unique_ptr<Process>> processes_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::exception_ptr failure_;
  bool cancelled_ = false;
  std::uint64_t random_;
};

}  // namespace tilewright_hls
