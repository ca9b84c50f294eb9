// SPDX-License-Identifier: Apache-2.0
#include "host/rtl_memory.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/require.h"

namespace tilewright::rtl {
namespace {

constexpr uint8_t kIncrementing = 1;
constexpr uint8_t kIdle = 0xA5;        // on data lines without valid: what takes it shows it
constexpr size_t kBeatsAhead = 32;     // write data that comes before its address
constexpr uint64_t kPage = 4096;

bool inside(const Fault& fault, uint64_t address, uint64_t bytes) {
  return address < fault.end && address + bytes > fault.begin;
}

}  // namespace

Response Memory::read(uint64_t address, uint8_t* out, uint64_t bytes) const {
  const bool held = holds(address, bytes);
  if (held) {
    std::memcpy(out, data_ + (address - base_), bytes);
  } else {
    std::memset(out, kIdle, bytes);
  }
  for (const Fault& fault : faults) {
    if (fault.reads && inside(fault, address, bytes)) return kSlaveError;
  }
  return held ? kOkay : kDecodeError;
}

Response Memory::write_response(uint64_t address, uint64_t bytes) const {
  for (const Fault& fault : faults) {
    if (fault.writes && inside(fault, address, bytes)) return kSlaveError;
  }
  return holds(address, bytes) ? kOkay : kDecodeError;
}

void Memory::write(uint64_t address, const uint8_t* in, uint64_t bytes, uint64_t strobes) {
  if (write_response(address, bytes) != kOkay) return;
  uint8_t* const out = data_ + (address - base_);
  for (uint64_t i = 0; i < bytes; ++i) {
    if (strobes >> i & 1) out[i] = in[i];
  }
}

void AddressChannel::check() const {
  const uint64_t address = *pins_.address, bytes = (uint64_t{*pins_.length} + 1) * bytes_;
  require(uint32_t{1} << *pins_.size == bytes_, name_, ": beats of 2**", int{*pins_.size}, " bytes, the port has ",
          bytes_);
  require(*pins_.kind == kIncrementing, name_, ": burst of kind ", int{*pins_.kind}, ", needed 1, incrementing");
  require(address % bytes_ == 0, name_, ": address ", address, " is no multiple of ", bytes_);
  require(address / kPage == (address + bytes - 1) / kPage, name_, ": ", bytes, " bytes from ", address,
          " on cross a 4 KiB edge");
}

bool AddressChannel::take(Burst& burst) {
  if (waits_) {
    require(*pins_.valid && *pins_.address == address_ && *pins_.length == length_, name_,
            ": an address that was offered changed before it was taken");
  }
  waits_ = *pins_.valid && !*pins_.ready;
  address_ = *pins_.address;
  length_ = *pins_.length;
  if (!*pins_.valid) return false;
  check();
  if (!*pins_.ready) return false;
  burst.address = address_;
  burst.beats = uint32_t{length_} + 1;
  return true;
}

ReadPort::ReadPort(const std::string& name, ReadPins pins, uint32_t bytes, const Timing& timing, uint64_t stream)
    : pins_(pins),
      bytes_(bytes),
      timing_(timing),
      pauses_(timing.pause, timing.seed * 16 + stream),
      address_(name + " AR", pins.address, bytes) {
  std::memset(pins_.data, kIdle, bytes_);
  *pins_.valid = 0;
}

void ReadPort::drive(uint64_t cycle) {
  address_.drive(bursts_.size() < timing_.outstanding && !pauses_.now());
  if (*pins_.valid && !taken_) return;
  if (bursts_.empty() || bursts_.front().ready > cycle || pauses_.now()) {
    if (*pins_.valid) std::memset(pins_.data, kIdle, bytes_);
    *pins_.valid = 0;
    return;
  }
  const Burst& burst = bursts_.front();
  std::memcpy(pins_.data, burst.bytes.data() + size_t{burst.at} * bytes_, bytes_);
  *pins_.response = burst.responses[burst.at];
  *pins_.last = burst.at + 1 == burst.beats;
  *pins_.valid = 1;
}

// Pins stay as they are until the edge is over, so what was taken only leaves the queue.
void ReadPort::sample(uint64_t cycle, const Memory& memory) {
  taken_ = *pins_.valid && *pins_.ready;
  if (taken_) {
    ++traffic_.beats;
    if (++bursts_.front().at == bursts_.front().beats) bursts_.pop_front();
  }
  Burst burst;
  if (!address_.take(burst)) return;
  burst.ready = cycle + timing_.latency;
  burst.bytes.resize(size_t{burst.beats} * bytes_);
  burst.responses.resize(burst.beats);
  for (uint32_t i = 0; i < burst.beats; ++i) {
    burst.responses[i] =
        memory.read(burst.address + uint64_t{i} * bytes_, burst.bytes.data() + size_t{i} * bytes_, bytes_);
  }
  ++traffic_.bursts;
  bursts_.push_back(std::move(burst));
}

WritePort::WritePort(const std::string& name, WritePins pins, uint32_t bytes, const Timing& timing, uint64_t stream)
    : name_(name + " W"),
      pins_(pins),
      bytes_(bytes),
      timing_(timing),
      pauses_(timing.pause, timing.seed * 16 + stream),
      address_(name + " AW", pins.address, bytes) {
  *pins_.answer_valid = 0;
}

void WritePort::drive(uint64_t cycle) {
  address_.drive(bursts_.size() + answers_.size() < timing_.outstanding && !pauses_.now());
  *pins_.ready = beats_.size() < kBeatsAhead && !pauses_.now();
  if (*pins_.answer_valid && !answered_) return;
  const bool due = !answers_.empty() && answers_.front().ready <= cycle;
  *pins_.answer_valid = due && !pauses_.now();
  if (*pins_.answer_valid) *pins_.response = answers_.front().responses[0];
}

void WritePort::sample(uint64_t cycle, Memory& memory) {
  answered_ = *pins_.answer_valid && *pins_.answer_ready;
  if (answered_) {
    const Burst& burst = answers_.front();
    for (uint32_t i = 0; i < burst.beats; ++i) {
      memory.write(burst.address + uint64_t{i} * bytes_, burst.bytes.data() + size_t{i} * bytes_, bytes_,
                   burst.strobes[i]);
    }
    answers_.pop_front();
  }
  take_beat();
  Burst burst;
  if (address_.take(burst)) {
    ++traffic_.bursts;
    bursts_.push_back(std::move(burst));
  }
  match(cycle, memory);
}

void WritePort::take_beat() {
  Beat beat{std::vector<uint8_t>(bytes_), 0, *pins_.last != 0};
  if (waits_ || *pins_.valid) {
    std::memcpy(beat.bytes.data(), pins_.data, bytes_);
    std::memcpy(&beat.strobes, pins_.strobes, std::max<size_t>(bytes_ / 8, 1));
  }
  if (waits_) {
    require(
        *pins_.valid && beat.bytes == waiting_.bytes && beat.strobes == waiting_.strobes && beat.last == waiting_.last,
        name_, ": a beat that was offered changed before it was taken");
  }
  waits_ = *pins_.valid && !*pins_.ready;
  if (waits_) waiting_ = std::move(beat);
  if (!*pins_.valid || !*pins_.ready) return;
  ++traffic_.beats;
  beats_.push_back(std::move(beat));
}

// Beats go to the oldest burst that lacks some.
void WritePort::match(uint64_t cycle, const Memory& memory) {
  while (!bursts_.empty() && !beats_.empty()) {
    Burst& burst = bursts_.front();
    const Beat& beat = beats_.front();
    burst.bytes.insert(burst.bytes.end(), beat.bytes.begin(), beat.bytes.end());
    burst.strobes.push_back(beat.strobes);
    ++burst.at;
    require(beat.last == (burst.at == burst.beats), name_, ": last is ", beat.last, " at beat ", burst.at, " of ",
            burst.beats);
    if (burst.at == burst.beats) {
      burst.ready = cycle + timing_.latency;
      burst.responses = {memory.write_response(burst.address, uint64_t{burst.beats} * bytes_)};
      answers_.push_back(std::move(burst));
      bursts_.pop_front();
    }
    beats_.pop_front();
  }
}

}  // namespace tilewright::rtl
