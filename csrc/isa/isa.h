// SPDX-License-Identifier: Apache-2.0
// Which instructions this machine has, and which level the kernels use.
#pragma once

#include <string>

namespace tilewright::isa {

// Each level includes the ones below it. kAvx512 means F, BW, DQ, VL and VNNI; kAvx512Bf16 adds the bfloat16 dot product.
enum class Level : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
inline constexpr int kLevels = 4;

// The best level that the processor has and the operating system saves registers for.
Level detected();

// detected(), unless TILEWRIGHT_ISA=generic|avx2|avx512|avx512_bf16 or set_active() asks for less.
// Throws when the variable names no level, or one this machine lacks.
Level active();
void set_active(const std::string& name);  // "" returns to the default

const char* name(Level level);
Level parse(const std::string& name);

// A kernel table: one entry a level, filled from the bottom. Levels without a kernel of their own use the one below.
template <class Function>
struct Table {
  Function entries[kLevels];
  Function pick() const { return entries[static_cast<int>(active())]; }
};

}  // namespace tilewright::isa
