// SPDX-License-Identifier: Apache-2.0
#include "host/rtl_simulation.h"

#include <verilated.h>

#include <array>
#include <cstdarg>
#include <cstdio>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "Vaccelerator.h"
#include "core/require.h"

namespace tilewright::rtl {
namespace {

constexpr uint32_t kControl = 0x000, kDescriptors = 0x140;
constexpr uint32_t kStart = 1, kBusy = 1;
constexpr uint64_t kTick = 1 << 14, kRegisterLimit = 1000;
constexpr int kResetCycles = 4;
constexpr std::array kReadPorts{"w0", "w1", "w2", "k", "v", "x"};

thread_local std::string printed;

// What the runtime said, without the line that only says that it stopped.
std::string take_printed() {
  std::string text = std::exchange(printed, {});
  return text.substr(0, text.find('\n'));
}

static_assert(std::is_same_v<decltype(Vaccelerator::m_axi_x_araddr), QData&>,
              "the ports' addresses have 33 to 64 bits");

}  // namespace

int print(const char* format, ...) {
  std::array<char, 1024> text;
  va_list arguments;
  va_start(arguments, format);
  const int count = std::vsnprintf(text.data(), text.size(), format, arguments);
  va_end(arguments);
  printed += text.data();
  return count;
}

std::map<std::string, int64_t> build_parameters() {
  std::map<std::string, int64_t> found;
  std::istringstream text(TILEWRIGHT_RTL_PARAMETERS);
  for (std::string one; std::getline(text, one, ',');) {
    const size_t split = one.find('=');
    found[one.substr(0, split)] = std::stoll(one.substr(split + 1));
  }
  return found;
}

#define TILEWRIGHT_ADDRESS_PINS(port, channel)                                                                    \
  AddressPins {                                                                                                   \
    &top.m_axi_##port##_##channel##addr, &top.m_axi_##port##_##channel##len, &top.m_axi_##port##_##channel##size, \
        &top.m_axi_##port##_##channel##burst, &top.m_axi_##port##_##channel##valid,                               \
        &top.m_axi_##port##_##channel##ready                                                                      \
  }
#define TILEWRIGHT_READ_PINS(port)                                                           \
  ReadPins {                                                                                 \
    TILEWRIGHT_ADDRESS_PINS(port, ar), &top.m_axi_##port##_rdata, &top.m_axi_##port##_rresp, \
        &top.m_axi_##port##_rlast, &top.m_axi_##port##_rvalid, &top.m_axi_##port##_rready    \
  }

struct Simulation::Design {
  explicit Design(const Timing& timing)
      : top(prepared(context, timing.seed), "accelerator"),
        bytes(static_cast<uint32_t>(sizeof top.m_axi_x_rdata)),
        reads{{{kReadPorts[0], TILEWRIGHT_READ_PINS(w0), bytes, timing, 0},
               {kReadPorts[1], TILEWRIGHT_READ_PINS(w1), bytes, timing, 1},
               {kReadPorts[2], TILEWRIGHT_READ_PINS(w2), bytes, timing, 2},
               {kReadPorts[3], TILEWRIGHT_READ_PINS(k), bytes, timing, 3},
               {kReadPorts[4], TILEWRIGHT_READ_PINS(v), bytes, timing, 4},
               {kReadPorts[5], TILEWRIGHT_READ_PINS(x), bytes, timing, 5}}},
        write("x",
              WritePins{TILEWRIGHT_ADDRESS_PINS(x, aw), &top.m_axi_x_wdata, &top.m_axi_x_wstrb, &top.m_axi_x_wlast,
                        &top.m_axi_x_wvalid, &top.m_axi_x_wready, &top.m_axi_x_bresp, &top.m_axi_x_bvalid,
                        &top.m_axi_x_bready},
              bytes, timing, 6) {}

  static VerilatedContext* prepared(VerilatedContext& context, uint64_t seed) {
    context.fatalOnError(false);
    context.randReset(2);
    context.randSeed(static_cast<int>(seed % 0x7FFFFFFE) + 1);
    return &context;
  }

  // Inputs settle while the clock is low; ports look at both sides of each handshake, then comes the edge.
  void settle() {
    for (ReadPort& port : reads) port.drive(cycle);
    write.drive(cycle);
    top.clk_i = 0;
    top.eval();
  }

  void edge(Memory& memory) {
    require(failed.empty(), "accelerator: it failed before (", failed, "); reset() begins anew");
    try {
      for (ReadPort& port : reads) port.sample(cycle, memory);
      write.sample(cycle, memory);
      top.clk_i = 1;
      top.eval();
      ++cycle;
      require(!context.gotError(), take_printed());
    } catch (const std::runtime_error& error) {
      failed = error.what();
      fail("accelerator: at cycle ", cycle, ": ", failed);
    }
  }

  VerilatedContext context;
  Vaccelerator top;
  uint32_t bytes;
  std::array<ReadPort, 6> reads;
  WritePort write;
  uint64_t cycle = 0;
  std::string failed;  // why, when it did
};

Simulation::Simulation(uint8_t* data, uint64_t base, uint64_t size, const Timing& timing)
    : memory_(data, base, size), timing_(timing) {
  reset();
}

Simulation::~Simulation() = default;

void Simulation::reset() {
  printed.clear();
  design_ = std::make_unique<Design>(timing_);
  Vaccelerator& top = design_->top;
  top.s_axil_awvalid = top.s_axil_wvalid = top.s_axil_bready = top.s_axil_arvalid = top.s_axil_rready = 0;
  top.rst_i = 1;
  for (int i = 0; i < kResetCycles; ++i) {
    top.clk_i = 0;
    top.eval();
    top.clk_i = 1;
    top.eval();
  }
  top.rst_i = 0;
}

uint32_t Simulation::read(uint32_t offset) {
  Vaccelerator& top = design_->top;
  top.s_axil_araddr = static_cast<SData>(offset);
  top.s_axil_arvalid = 1;
  top.s_axil_rready = 1;
  for (uint64_t i = 0; i < kRegisterLimit; ++i) {
    design_->settle();
    const bool asked = top.s_axil_arvalid && top.s_axil_arready, answered = top.s_axil_rvalid;
    const uint32_t value = top.s_axil_rdata;
    design_->edge(memory_);
    if (asked) top.s_axil_arvalid = 0;
    if (answered) {
      top.s_axil_rready = 0;
      return value;
    }
  }
  fail("accelerator: register ", offset, " is not read within ", kRegisterLimit, " cycles");
}

void Simulation::write(uint32_t offset, uint32_t value) {
  Vaccelerator& top = design_->top;
  top.s_axil_awaddr = static_cast<SData>(offset);
  top.s_axil_wdata = value;
  top.s_axil_wstrb = 0xF;
  top.s_axil_awvalid = top.s_axil_wvalid = top.s_axil_bready = 1;
  for (uint64_t i = 0; i < kRegisterLimit; ++i) {
    design_->settle();
    const bool named = top.s_axil_awvalid && top.s_axil_awready, given = top.s_axil_wvalid && top.s_axil_wready;
    const bool answered = top.s_axil_bvalid;
    design_->edge(memory_);
    if (named) top.s_axil_awvalid = 0;
    if (given) top.s_axil_wvalid = 0;
    if (answered) {
      top.s_axil_bready = 0;
      return;
    }
  }
  fail("accelerator: register ", offset, " is not written within ", kRegisterLimit, " cycles");
}

uint64_t Simulation::run(uint64_t limit, const std::function<void(uint64_t)>& tick) {
  const uint64_t begin = cycles();
  write(kControl, kStart);
  while (cycles() - begin < limit) {
    design_->settle();
    const bool done = design_->top.irq_o;
    design_->edge(memory_);
    if (done && (read(kControl) & kBusy) == 0) return cycles() - begin;
    if ((cycles() - begin) % kTick == 0) tick(cycles() - begin);
  }
  fail("accelerator: no end within ", limit, " cycles; ", state());
}

// How far a run came, and which port's bursts are without an answer.
std::string Simulation::state() {
  std::ostringstream text;
  text << read(kDescriptors) << " descriptors begun, beats";
  for (const auto& [name, port] : traffic()) text << " " << name << " " << port.beats;
  text << ", bursts unanswered";
  for (size_t i = 0; i < kReadPorts.size(); ++i) text << " " << kReadPorts[i] << " " << design_->reads[i].outstanding();
  text << " x_write " << design_->write.outstanding();
  return text.str();
}

uint64_t Simulation::cycles() const { return design_->cycle; }

std::map<std::string, Traffic> Simulation::traffic() const {
  std::map<std::string, Traffic> found{{"x_write", design_->write.traffic()}};
  for (size_t i = 0; i < kReadPorts.size(); ++i) found[kReadPorts[i]] = design_->reads[i].traffic();
  return found;
}

Memory& Simulation::memory() { return memory_; }

}  // namespace tilewright::rtl
