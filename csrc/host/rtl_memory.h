// SPDX-License-Identifier: Apache-2.0
// External memory behind AXI4 ports, for the simulation of RTL: latency, bursts under way, pauses drawn from a seed, error
// responses in ranges of addresses. A breach of the protocol is an error that names the port.
//
// Reads give what memory held when their address was taken, writes are seen from their answer on: the earliest and the
// latest that AXI allows, so that a master that reads what it has not seen answered gets the old bytes.
#pragma once

#include <cstdint>
#include <deque>
#include <random>
#include <string>
#include <vector>

namespace tilewright::rtl {

enum Response : uint8_t { kOkay = 0, kSlaveError = 2, kDecodeError = 3 };

struct Fault {
  uint64_t begin, end;  // addresses
  bool reads, writes;
};

// Bytes of the caller's from an address on; what lies outside answers with a decode error.
class Memory {
 public:
  Memory(uint8_t* data, uint64_t base, uint64_t size) : data_(data), base_(base), size_(size) {}

  Response read(uint64_t address, uint8_t* out, uint64_t bytes) const;
  Response write_response(uint64_t address, uint64_t bytes) const;
  // Bytes whose bit is set in strobes; nothing where the response is an error.
  void write(uint64_t address, const uint8_t* in, uint64_t bytes, uint64_t strobes);

  std::vector<Fault> faults;

 private:
  bool holds(uint64_t address, uint64_t bytes) const {
    return address >= base_ && address - base_ <= size_ && bytes <= size_ - (address - base_);
  }

  uint8_t* data_;
  uint64_t base_, size_;
};

struct Timing {
  uint64_t latency;  // cycles from a burst's address to its first beat, or from its last beat to the answer
  uint64_t outstanding;  // bursts
  double pause;  // probability that a ready or valid that could be high is low in a cycle
  uint64_t seed;
};

// What a port has seen.
struct Traffic {
  uint64_t bursts = 0, beats = 0;
};

class Pauses {
 public:
  Pauses(double probability, uint64_t seed) : limit_(static_cast<uint64_t>(probability * 0x1p32)), random_(seed) {}
  bool now() { return limit_ != 0 && random_() < limit_; }

 private:
  uint64_t limit_;
  std::mt19937 random_;
};

struct Burst {
  uint64_t address = 0;
  uint32_t beats = 0;
  uint64_t ready = 0;  // cycle from which the memory may answer
  uint32_t at = 0;  // beats done
  std::vector<uint8_t> bytes;
  std::vector<Response> responses;
  std::vector<uint64_t> strobes;
};

// An address channel: AR or AW.
struct AddressPins {
  const uint64_t* address;
  const uint8_t *length, *size, *kind, *valid;
  uint8_t* ready;
};

class AddressChannel {
 public:
  AddressChannel(std::string name, AddressPins pins, uint32_t bytes)
      : name_(std::move(name)), pins_(pins), bytes_(bytes) {}
  void drive(bool ready) { *pins_.ready = ready; }
  // Whether an address is taken at this edge; it goes to burst.
  bool take(Burst& burst);

 private:
  void check() const;

  std::string name_;
  AddressPins pins_;
  uint32_t bytes_;  // of a beat
  bool waits_ = false;
  uint64_t address_ = 0;  // of the one that waits
  uint8_t length_ = 0;
};

struct ReadPins {
  AddressPins address;
  void* data;
  uint8_t *response, *last, *valid;
  const uint8_t* ready;
};

class ReadPort {
 public:
  ReadPort(const std::string& name, ReadPins pins, uint32_t bytes, const Timing& timing, uint64_t stream);
  void drive(uint64_t cycle);
  void sample(uint64_t cycle, const Memory& memory);
  const Traffic& traffic() const { return traffic_; }
  size_t outstanding() const { return bursts_.size(); }

 private:
  ReadPins pins_;
  uint32_t bytes_;
  Timing timing_;
  Pauses pauses_;
  AddressChannel address_;
  std::deque<Burst> bursts_;
  bool taken_ = false;  // the beat on the pins, at the last edge
  Traffic traffic_;
};

struct WritePins {
  AddressPins address;
  const void *data, *strobes;
  const uint8_t *last, *valid;
  uint8_t* ready;
  uint8_t *response, *answer_valid;
  const uint8_t* answer_ready;
};

class WritePort {
 public:
  WritePort(const std::string& name, WritePins pins, uint32_t bytes, const Timing& timing, uint64_t stream);
  void drive(uint64_t cycle);
  void sample(uint64_t cycle, Memory& memory);
  const Traffic& traffic() const { return traffic_; }
  size_t outstanding() const { return bursts_.size() + answers_.size(); }

 private:
  struct Beat {
    std::vector<uint8_t> bytes;
    uint64_t strobes;
    bool last;
  };

  void take_beat();
  void match(uint64_t cycle, const Memory& memory);

  std::string name_;
  WritePins pins_;
  uint32_t bytes_;
  Timing timing_;
  Pauses pauses_;
  AddressChannel address_;
  std::deque<Beat> beats_;  // whose address has not come
  std::deque<Burst> bursts_, answers_;  // whose beats, whose answer is still to come
  bool waits_ = false, answered_ = false;
  Beat waiting_{};
  Traffic traffic_;
};

}  // namespace tilewright::rtl
