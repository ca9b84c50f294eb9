// SPDX-License-Identifier: Apache-2.0
#include "engine/program.h"

#include <cmath>
#include <map>
#include <memory>

#include "core/memory.h"
#include "format/header.h"

namespace tilewright::engine {
namespace {

constexpr int64_t kMaxWidth = int64_t{1} << 31;
constexpr int64_t kSlotMultiple = 16;  // slots start at multiples of a cache line

std::map<int64_t, RecordKind>& kinds() {
  static std::map<int64_t, RecordKind> table;
  return table;
}

void check_header(Words program, Arena weights) {
  require(program.count >= kHeaderWords, "engine: program has ", program.count, " words, fewer than the ",
          static_cast<int64_t>(kHeaderWords), " of its header; compile the model again");
  const int64_t* header = program.data;
  require(header[kMagicAt] == kMagic,
          "engine: program does not start with the engine's magic; pass ModelImage.program of tilewright.models.image");
  require(header[kVersionAt] == kVersion, "engine: program has version ", header[kVersionAt],
          ", this build reads version ", kVersion, "; compile the model again");
  require(header[kWordsAt] == program.count, "engine: program has ", program.count, " words, its header states ",
          header[kWordsAt], "; it is truncated or padded");
  require(header[kChecksumAt] == checksum(program), "engine: program does not match its checksum; it is damaged");
  require(header[kWeightBytesAt] == weights.bytes, "engine: weights have ", weights.bytes, " bytes, the program needs ",
          header[kWeightBytesAt], "; pass the weights compiled together with it");
  require(
      reinterpret_cast<uintptr_t>(weights.data) % kCacheLine == 0,
      "engine: weights do not start at a multiple of 64 bytes; pass the arena itself, not a view into another tensor");
}

}  // namespace

RegisterRecord::RegisterRecord(RecordKind kind) { kinds()[static_cast<int64_t>(kind.kind)] = kind; }

const RecordKind* find_record(int64_t kind) {
  const auto found = kinds().find(kind);
  return found == kinds().end() ? nullptr : &found->second;
}

struct StepArena::Block {
  static constexpr size_t kBytes = size_t{1} << 16;
  alignas(64) std::byte bytes[kBytes];
};

void* StepArena::allocate(size_t bytes) {
  // Blocks are kept for the next parse of any program on this thread.
  thread_local std::vector<std::unique_ptr<Block>> blocks;
  bytes = static_cast<size_t>(round_up(static_cast<int64_t>(bytes), kCacheLine));
  require(bytes <= Block::kBytes, "engine: a step of ", bytes, " bytes does not fit a block");
  if (used_ + bytes > Block::kBytes) {
    ++block_;
    used_ = 0;
  }
  while (blocks.size() <= block_) blocks.push_back(std::make_unique<Block>());
  void* at = blocks[block_]->bytes + used_;
  used_ += bytes;
  return at;
}

int64_t checksum(Words program) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int64_t i = 0; i < program.count; ++i) {
    if (i != kChecksumAt) hash = (hash ^ static_cast<uint64_t>(program.data[i])) * 0x100000001b3u;
  }
  return static_cast<int64_t>(hash);
}

int64_t Reader::next(const char* name) {
  check(at_ < arguments_.count, "argument '", name, "' is missing, the record has ", arguments_.count, " arguments");
  return arguments_.data[at_++];
}

int64_t Reader::integer(const char* name, int64_t least, int64_t most) {
  const int64_t value = next(name);
  check(value >= least && value <= most, "argument '", name, "' is ", value, ", needed ", least, "..", most);
  return value;
}

float Reader::real(const char* name) {
  const auto value = std::bit_cast<double>(next(name));
  check(std::isfinite(value) && std::fabs(value) <= 3e38, "argument '", name, "' is not a finite float");
  return static_cast<float>(value);
}

Slot Reader::optional_slot(const char* name, int64_t width) {
  check(at_ < arguments_.count, "argument '", name, "' is missing, the record has ", arguments_.count, " arguments");
  if (arguments_.data[at_] != kAbsent) return slot(name, width);
  ++at_;
  return {0, 0};
}

Slot Reader::slot(const char* name, int64_t width) {
  const int64_t index = integer(name, 0, static_cast<int64_t>(slots_.size()) - 1);
  const Slot slot = slots_[static_cast<size_t>(index)];
  check(width == kAnyWidth || slot.width == width, "slot '", name, "' has width ", slot.width, ", needed ", width);
  return slot;
}

const float* Reader::floats(const char* name, int64_t count) {
  const float* found = optional_floats(name, count);
  check(found != nullptr, "weights '", name, "' are absent");
  return found;
}

const float* Reader::optional_floats(const char* name, int64_t count) {
  const int64_t offset = next(name);
  if (offset == kAbsent) return nullptr;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
  check(offset >= 0 && offset % static_cast<int64_t>(alignof(float)) == 0 && bytes <= weights_.bytes &&
            offset <= weights_.bytes - bytes,
        "weights '", name, "' at byte ", offset, " do not lie inside the arena of ", weights_.bytes, " bytes");
  return reinterpret_cast<const float*>(weights_.data + offset);
}

Arena Reader::blob(const char* name) {
  const int64_t offset = next(name);
  const int64_t bytes = next(name);
  check(offset >= 0 && offset % kCacheLine == 0 && bytes >= 0 && bytes <= weights_.bytes &&
            offset <= weights_.bytes - bytes,
        "weights '", name, "' at bytes ", offset, " + ", bytes, " do not lie inside the arena of ", weights_.bytes,
        " bytes, at a multiple of 64");
  return {weights_.data + offset, bytes};
}

void Reader::finish() const {
  check(at_ == arguments_.count, "has ", arguments_.count, " arguments, this kind reads ", at_);
}

void parse(Words program, Arena weights, Program& out) {
  check_header(program, weights);
  const int64_t slots = program.data[kSlotsAt];
  const int64_t records = program.data[kRecordsAt];
  int64_t at = kHeaderWords;
  require(slots >= 0 && slots <= (program.count - at) / 2, "engine: program states ", slots,
          " slots, more than it has words for; it is damaged");
  out.slots.clear();
  out.floats_per_token = 0;
  int64_t room = 0;  // what the slots need side by side: one that starts beyond it would only make the workspace larger
  for (int64_t s = 0; s < slots; ++s, at += 2) {
    const Slot slot{program.data[at], program.data[at + 1]};
    require(slot.offset >= 0 && slot.offset < kMaxWidth && slot.width > 0 && slot.width < kMaxWidth, "engine: slot ", s,
            " has offset ", slot.offset, " and width ", slot.width, "; the program is damaged");
    out.floats_per_token = std::max(out.floats_per_token, slot.offset + slot.width);
    room += round_up(slot.width, kSlotMultiple);
    out.slots.push_back(slot);
  }
  require(out.floats_per_token <= room, "engine: slots reach to float ", out.floats_per_token, " of a token, but need ",
          room, " side by side; the program is damaged");
  out.logits = program.data[kLogitsAt];
  out.checksum = program.data[kChecksumAt];
  out.steps.clear();
  StepArena arena;
  for (int64_t r = 0; r < records; ++r) {
    require(at + 2 <= program.count, "engine: program ends before record ", r, " of ", records);
    const RecordKind* kind = find_record(program.data[at]);
    const int64_t arguments = program.data[at + 1];
    require(kind != nullptr, "engine: record ", r, " has kind ", program.data[at],
            ", which this build does not know; compile the model again");
    at += 2;
    require(arguments >= 0 && arguments <= program.count - at, "engine: record ", r, " states ", arguments,
            " arguments, more than the program has words");
    Reader reader({program.data + at, arguments}, out.slots, weights, r, kind->name);
    out.steps.push_back(kind->parse(reader, arena));
    reader.finish();
    at += arguments;
  }
  require(at == program.count, "engine: program has ", program.count - at, " words after its last record");
}

}  // namespace tilewright::engine
