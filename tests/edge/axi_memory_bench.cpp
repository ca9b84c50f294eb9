// SPDX-License-Identifier: Apache-2.0
// Drives the simulation's memory ports by hand: what they give, when, and each breach of AXI that they must name.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>

#include "host/rtl_memory.h"

namespace {

using namespace tilewright::rtl;

int cases = 0;

void check(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

struct Address {
  uint64_t address = 0;
  uint8_t length = 0, size = 3, kind = 1, valid = 0, ready = 0;
  AddressPins pins() { return {&address, &length, &size, &kind, &valid, &ready}; }
};

// Ports of eight bytes on 8 KiB of memory from 4096 on, and the cycles that both see.
struct Bench {
  explicit Bench(Timing timing = {0, 4, 0, 1})
      : reads("r", {read.pins(), &read_data, &read_response, &read_last, &read_valid, &read_ready}, 8, timing, 0),
        writes("w",
               {write.pins(), &write_data, &strobes, &write_last, &write_valid, &write_ready, &answer, &answer_valid,
                &answer_ready},
               8, timing, 1) {
    for (size_t i = 0; i < sizeof bytes; ++i) bytes[i] = static_cast<uint8_t>(i % 251);
  }

  void step() {
    reads.drive(cycle);
    writes.drive(cycle);
    taken = read.valid && read.ready;
    reads.sample(cycle, memory);
    writes.sample(cycle, memory);
    ++cycle;
  }

  uint64_t at(uint64_t address) const {
    uint64_t value = 0;
    for (int i = 7; i >= 0; --i) value = value << 8 | bytes[address - 4096 + static_cast<uint64_t>(i)];
    return value;
  }

  uint8_t bytes[8192];
  Memory memory{bytes, 4096, sizeof bytes};
  Address read, write;
  uint64_t read_data = 0, write_data = 0, cycle = 0;
  uint8_t read_response = 0, read_last = 0, read_valid = 1, read_ready = 1, strobes = 0xFF, write_last = 0;
  uint8_t write_valid = 0, write_ready = 0, answer = 0, answer_valid = 1, answer_ready = 1;
  bool taken = false;
  ReadPort reads;
  WritePort writes;
};

void breach(const std::string& message, const std::function<void(Bench&)>& act) {
  Bench bench;
  ++cases;
  try {
    act(bench);
  } catch (const std::runtime_error& error) {
    check(std::string(error.what()).find(message) != std::string::npos, "'" + message + "' is not in: " + error.what());
    return;
  }
  check(false, "no error with '" + message + "'");
}

void ask(Bench& bench, uint64_t address, uint8_t length, uint8_t size = 3, uint8_t kind = 1) {
  bench.read.address = address;
  bench.read.length = length;
  bench.read.size = size;
  bench.read.kind = kind;
  bench.read.valid = 1;
  bench.step();
  bench.read.valid = 0;
}

void give(Bench& bench, uint64_t value, bool last) {
  bench.write_data = value;
  bench.write_last = last;
  bench.write_valid = 1;
  bench.step();
  bench.write_valid = 0;
}

void reads_come_in_order_after_their_latency() {
  ++cases;
  Bench bench({5, 4, 0, 1});
  ask(bench, 4096 + 16, 2);
  const uint64_t asked = bench.cycle - 1;
  for (uint64_t beat = 0; beat < 3;) {
    const uint64_t now = bench.cycle;
    bench.step();
    if (!bench.read_valid) continue;
    check(now >= asked + 5, "a beat before its latency");
    check(bench.read_data == bench.at(4096 + 16 + 8 * beat), "another beat's data");
    check(bench.read_last == (beat == 2) && bench.read_response == kOkay, "last or the response");
    ++beat;
    check(bench.cycle < 100, "no answer");
  }
}

void a_read_before_the_answer_gives_what_was_there() {
  ++cases;
  Bench bench;
  const uint64_t old = bench.at(4096);
  bench.answer_ready = 0;
  bench.write.address = 4096;
  bench.write.valid = 1;
  bench.step();
  bench.write.valid = 0;
  give(bench, 0x1122334455667788, true);
  for (int i = 0; i < 10; ++i) bench.step();
  check(bench.answer_valid && bench.answer == kOkay && bench.at(4096) == old, "written before its answer was taken");
  ask(bench, 4096, 0);
  bench.answer_ready = 1;
  bench.step();
  check(bench.read_valid && bench.read_data == old, "a read saw what was not answered");
  check(bench.at(4096) == 0x1122334455667788, "not written");
}

void strobes_choose_bytes() {
  ++cases;
  Bench bench;
  bench.write.address = 4104;
  bench.strobes = 0x0F;
  const uint64_t old = bench.at(4104);
  give(bench, 0xAAAAAAAAAAAAAAAA, true);  // data before its address
  bench.write.valid = 1;
  bench.step();
  bench.write.valid = 0;
  for (int i = 0; i < 5; ++i) bench.step();
  check(bench.at(4104) == ((old & 0xFFFFFFFF00000000) | 0xAAAAAAAA), "other bytes than the strobes'");
}

void errors_of_ranges_and_of_what_is_not_there() {
  ++cases;
  Bench bench;
  bench.memory.faults.push_back({4096 + 9, 4096 + 10, true, false});
  const uint8_t wanted[] = {kOkay, kSlaveError, kOkay, kDecodeError, kDecodeError};
  const uint64_t places[] = {4096, 4096 + 8, 4096 + 16, 4088, 4096 + 8192};
  for (int i = 0; i < 5; ++i) {
    ask(bench, places[i], 0);
    bench.step();
    check(bench.read_valid && bench.read_response == wanted[i], "response of read " + std::to_string(i));
    bench.step();
  }
  check(bench.memory.write_response(4096 + 8, 8) == kOkay, "writes are not in the fault");
}

void no_more_bursts_than_allowed() {
  ++cases;
  Bench bench({50, 2, 0, 1});
  int taken = 0;
  bench.read.valid = 1;
  bench.read.address = 4096;
  for (int i = 0; i < 40; ++i) {
    bench.step();
    taken += bench.taken;
  }
  check(taken == 2 && bench.reads.outstanding() == 2, "bursts under way");
}

}  // namespace

int main() {
  reads_come_in_order_after_their_latency();
  a_read_before_the_answer_gives_what_was_there();
  strobes_choose_bytes();
  errors_of_ranges_and_of_what_is_not_there();
  no_more_bursts_than_allowed();
  breach("r AR: beats of 2**2 bytes, the port has 8", [](Bench& b) { ask(b, 4096, 0, 2); });
  breach("r AR: burst of kind 0", [](Bench& b) { ask(b, 4096, 0, 3, 0); });
  breach("r AR: address 4100 is no multiple of 8", [](Bench& b) { ask(b, 4100, 0); });
  breach("r AR: 24 bytes from 8176 on cross a 4 KiB edge", [](Bench& b) { ask(b, 8176, 2); });
  breach("w AW: address 4097", [](Bench& b) {
    b.write.address = 4097;
    b.write.valid = 1;
    b.step();
  });
  const auto full = [](Bench& b) {
    for (int i = 0; i < 4; ++i) ask(b, 4096, 15);
    b.read.valid = 1;
    b.step();
  };
  breach("r AR: an address that was offered changed", [&](Bench& b) {
    full(b);
    b.read.address += 8;
    b.step();
  });
  breach("r AR: an address that was offered changed", [&](Bench& b) {
    full(b);
    b.read.valid = 0;
    b.step();
  });
  const auto ahead = [](Bench& b) {
    for (uint64_t i = 0; i < 33; ++i) give(b, i, false);
    b.write_valid = 1;
  };
  breach("w W: a beat that was offered changed", [&](Bench& b) {
    ahead(b);
    b.write_data = 77;
    b.step();
  });
  breach("w W: last is 1 at beat 1 of 2", [](Bench& b) {
    b.write.length = 1;
    b.write.address = 4096;
    b.write.valid = 1;
    b.step();
    b.write.valid = 0;
    give(b, 1, true);
  });
  breach("w W: last is 0 at beat 1 of 1", [](Bench& b) {
    give(b, 1, false);
    b.write.address = 4096;
    b.write.valid = 1;
    b.step();
  });
  std::printf("%d cases\n", cases);
}
