// SPDX-License-Identifier: Apache-2.0
#include "microbench/microbench.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "core/memory.h"
#include "core/require.h"
#include "isa/isa.h"

namespace tilewright::microbench {
namespace {

using Clock = std::chrono::steady_clock;

const Loops& active_loops() {
#if defined(__x86_64__)
  switch (isa::active()) {
    case isa::Level::kAvx512Bf16: return avx512_bf16::loops;
    case isa::Level::kAvx512: return avx512::loops;
    case isa::Level::kAvx2: return avx2::loops;
    case isa::Level::kGeneric: break;
  }
#endif
  return generic::loops;
}

std::atomic<uint64_t> sink{0};

// All threads start a slice together; the slice ends when the last one is done. Returns the shortest slice in seconds.
template <class Slice>
double shortest_slice(int threads, double seconds, const Slice& slice) {
  double best = 1e300;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    std::atomic<int> waiting{threads};
    std::vector<std::thread> team;
    std::vector<Clock::time_point> started(static_cast<size_t>(threads)), stopped(static_cast<size_t>(threads));
    for (int t = 0; t < threads; ++t) {
      team.emplace_back([&, t] {
        waiting.fetch_sub(1);
        while (waiting.load() > 0) std::this_thread::yield();
        started[static_cast<size_t>(t)] = Clock::now();
        sink += slice(t);
        stopped[static_cast<size_t>(t)] = Clock::now();
      });
    }
    for (auto& member : team) member.join();
    const auto first = *std::min_element(started.begin(), started.end());
    const auto last = *std::max_element(stopped.begin(), stopped.end());
    best = std::min(best, std::chrono::duration<double>(last - first).count());
  } while (Clock::now() < end);
  return best;
}

}  // namespace

double read_bytes_per_second(const uint8_t* buffer, int64_t bytes, int threads, double seconds) {
  require(threads > 0, "read_bytes_per_second: threads = ", threads, ", needed at least 1");
  const auto read = active_loops().read;
  const int64_t share = bytes / threads / 256 * 256;
  require(share > 0, "read_bytes_per_second: a buffer of ", bytes, " bytes is too small for ", threads, " threads");
  const double best = shortest_slice(threads, seconds, [&](int t) { return read(buffer + t * share, share); });
  return static_cast<double>(share) * threads / best;
}

double peak_operations_per_second(const std::string& kind, int threads, double seconds) {
  require(threads > 0, "peak_operations_per_second: threads = ", threads, ", needed at least 1");
  const Loops& loops = active_loops();
  const bool int8 = kind == "int8", bf16 = kind == "bf16";
  require(int8 || bf16 || kind == "fp32", "peak_operations_per_second: kind '", kind, "', needed int8, bf16 or fp32");
  const auto loop = int8 ? loops.int8 : bf16 ? loops.bf16 : loops.fp32;
  const int64_t operations = int8 ? loops.int8_operations : bf16 ? loops.bf16_operations : loops.fp32_operations;
  constexpr int64_t kRounds = 400000;
  const double best = shortest_slice(threads, seconds, [&](int) { return loop(kRounds); });
  return static_cast<double>(operations) * kRounds * threads / best;
}

}  // namespace tilewright::microbench
