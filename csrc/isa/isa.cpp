// SPDX-License-Identifier: Apache-2.0
#include "isa/isa.h"

#include <atomic>
#include <cstdlib>

#include "core/require.h"
#include "isa/probe.h"

namespace tilewright::isa {
namespace {

constexpr const char* kNames[kLevels] = {"generic", "avx2", "avx512", "avx512_bf16"};
constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

Level require_available(Level level, const char* source) {
  require(level <= detected(), source, " asks for ", name(level), ", but this machine goes up to ", name(detected()),
          "; choose that or a lower level");
  return level;
}

Level from_environment() {
  const char* wanted = std::getenv("TILEWRIGHT_ISA");
  if (wanted == nullptr || *wanted == '\0') return detected();
  return require_available(parse(wanted), "TILEWRIGHT_ISA");
}

}  // namespace

const char* name(Level level) { return kNames[static_cast<int>(level)]; }

Level parse(const std::string& text) {
  for (int i = 0; i < kLevels; ++i) {
    if (text == kNames[i]) return static_cast<Level>(i);
  }
  fail("TILEWRIGHT_ISA: '", text, "' names no level; use generic, avx2, avx512 or avx512_bf16");
}

Level detected() {
  static const Level level = static_cast<Level>(probe_cpu());
  return level;
}

Level active() {
  int level = chosen.load(std::memory_order_relaxed);
  if (level == kUnset) {
    level = static_cast<int>(from_environment());
    chosen.store(level, std::memory_order_relaxed);
  }
  return static_cast<Level>(level);
}

void set_active(const std::string& text) {
  chosen.store(text.empty() ? kUnset : static_cast<int>(require_available(parse(text), "set_isa")),
               std::memory_order_relaxed);
}

}  // namespace tilewright::isa
