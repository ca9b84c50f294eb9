// SPDX-License-Identifier: Apache-2.0
// Kernels that are right, and the same kernels with one fault each: what every case is, and how it runs.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "hopper/hopper.h"
#include "host_cuda.h"

namespace tilewright::emulator_tests {

using namespace tilewright::hopper;

// Memory that the kernel may touch, exactly.
template <class T>
class Global {
 public:
  explicit Global(size_t count, T value = T{}) : count_(count) {
    cudaMalloc(&data_, count * sizeof(T));
    for (size_t i = 0; i < count; ++i) data_[i] = value;
  }
  ~Global() { cudaFree(data_); }
  Global(const Global&) = delete;
  Global& operator=(const Global&) = delete;
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// run() is true where the results are right. A case with a fault must end in an error that says `expected`, or one of
// several texts separated by `|` where the order of threads decides which rule is broken first.
struct Case {
  std::string name, expected;
  std::function<bool()> run;
};

void run_layouts(const std::string& tables);  // prints like main
std::vector<Case> unit_cases();
std::vector<Case> simple_cases();
std::vector<Case> pipeline_cases();
std::vector<Case> product_cases();
std::vector<Case> store_cases();
std::vector<Case> cluster_cases();

}  // namespace tilewright::emulator_tests
