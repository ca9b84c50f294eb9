// SPDX-License-Identifier: Apache-2.0
// A grid from its launch to its end, and the settings of the emulator.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <tuple>

#include "emulator/control.h"
#include "emulator/state.h"

extern tilewright::emulator::Dim3 blockDim, gridDim;

namespace tilewright::emulator {

void run_clusters(std::vector<int64_t> order);

namespace {

Settings settings;
std::vector<std::unique_ptr<Fiber>> spare_fibers;

// The kernel's own name where the library exports it, else that of its parameter, which the launch's signature ends in.
std::string kernel_name(const void* kernel, const char* signature) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) {
    const std::string text = signature;
    const size_t from = text.find("Params = "), end = text.rfind(']');
    if (from == std::string::npos || end == std::string::npos) return "a kernel";
    return "the kernel of " + text.substr(from + 9, end - from - 9);
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  if (name.starts_with("void ")) name.erase(0, 5);
  if (const size_t end = name.rfind('('); end != std::string::npos && end > 0) name.erase(end);
  return name.size() > 160 ? name.substr(0, 157) + "..." : name;
}

// Where TILEWRIGHT_EMULATOR_LAUNCHES names a file, it gets one line for each kernel and shape of its blocks: the kernel's
// place in its library (names of the kernels are not exported), threads, bytes of dynamic shared memory, cluster.
void note_launch(const void* kernel, const GridShape& shape) {
  static const char* const path = std::getenv("TILEWRIGHT_EMULATOR_LAUNCHES");
  if (path == nullptr) return;
  static std::set<std::tuple<const void*, int, int, int>> seen;
  if (!seen.emplace(kernel, shape.threads, shape.shared_bytes, shape.cluster).second) return;
  Dl_info info{};
  if (dladdr(kernel, &info) == 0) return;
  if (std::FILE* file = std::fopen(path, "a")) {
    const auto place = static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase);
    std::fprintf(file, "%s %tx %d %d %d\n", info.dli_fname, place, shape.threads, shape.shared_bytes, shape.cluster);
    std::fclose(file);
  }
}

void check_shape(const GridShape& shape) {
  if (shape.threads < 1 || shape.threads > kMaxThreads) {
    kernel_error("a block of %d threads; 1 to %d are possible", shape.threads, kMaxThreads);
  }
  if (shape.shared_bytes < 0 || shape.shared_bytes > static_cast<int>(kMaxSharedBytes)) {
    kernel_error("%d bytes of shared memory; a block has at most %zu", shape.shared_bytes, kMaxSharedBytes);
  }
  if (shape.cluster < 1 || shape.cluster > 8)
    kernel_error("a cluster of %d blocks; 1 to 8 are possible", shape.cluster);
  if (shape.blocks_x % shape.cluster != 0) {
    kernel_error("%lld blocks along x are no whole number of clusters of %d", static_cast<long long>(shape.blocks_x),
                 shape.cluster);
  }
}

// The one grid that runs, and what it leaves behind however it ends.
class Running {
 public:
  explicit Running(Machine& grid) : grid_(grid) {
    grid_.spare_fibers = std::exchange(spare_fibers, {});
    machine = &grid_;
  }
  ~Running() {
    grid_.running.clear();
    machine = nullptr;
    forget_joins();
    spare_fibers = std::move(grid_.spare_fibers);
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  Machine& grid_;
};

}  // namespace

Settings& current_settings() { return settings; }

int multiprocessors() { return settings.multiprocessors; }

void run_grid(const GridShape& shape, Body body, const void* call, const void* kernel, const char* signature,
              const void* params, size_t param_bytes) {
  static std::mutex one_grid;
  const std::scoped_lock lock(one_grid);
  check_shape(shape);
  Machine grid;
  grid.shape = shape;
  grid.body = body;
  grid.call = call;
  grid.params = static_cast<const char*>(params);
  grid.param_bytes = param_bytes;
  grid.random.seed(settings.seed);
  const Running running(grid);
  blockDim = {static_cast<unsigned>(shape.threads), 1, 1};
  gridDim = {static_cast<unsigned>(shape.blocks_x), static_cast<unsigned>(shape.blocks_y),
             static_cast<unsigned>(shape.blocks_z)};
  std::vector<int64_t> order(shape.blocks_x * shape.blocks_y * shape.blocks_z / shape.cluster);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (settings.seed != 0) std::shuffle(order.begin(), order.end(), grid.random);
  ++settings.launches;
  note_launch(kernel, shape);
  run_clusters(std::move(order));
  if (!grid.error.empty()) {
    throw std::runtime_error("emulator: " + kernel_name(kernel, signature) + ": " + grid.error + " (seed " +
                             std::to_string(settings.seed) + ")");
  }
}

}  // namespace tilewright::emulator
