// SPDX-License-Identifier: Apache-2.0
// The accelerator's RTL as Verilator's C++, clocked, with memory behind its ports and a driver for its registers.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "host/rtl_memory.h"

namespace tilewright::rtl {

// Parameters of the RTL that was compiled, by name.
std::map<std::string, int64_t> build_parameters();

class Simulation {
 public:
  // Registers that reset does not set begin with bits drawn from the timing's seed.
  Simulation(uint8_t* data, uint64_t base, uint64_t size, const Timing& timing);
  ~Simulation();

  // A new design and idle ports; memory keeps its bytes.
  void reset();
  uint32_t read(uint32_t offset);
  void write(uint32_t offset, uint32_t value);
  // Starts and clocks until the run is done; cycles that passed. tick is called now and then.
  // Throws when there is no end within limit, an assertion of the RTL or a port's protocol fails: then only reset helps.
  uint64_t run(uint64_t limit, const std::function<void(uint64_t)>& tick);

  uint64_t cycles() const;
  std::map<std::string, Traffic> traffic() const;
  Memory& memory();

 private:
  struct Design;

  std::string state();

  Memory memory_;
  Timing timing_;
  std::unique_ptr<Design> design_;
};

}  // namespace tilewright::rtl
