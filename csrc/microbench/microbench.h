// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most: the two numbers that kernels are judged by, measured rather than quoted.
#pragma once

#include <cstdint>
#include <string>

namespace tilewright::microbench {

// Each runs for about `seconds` on `threads` threads at once and returns the best rate seen over short slices.
double read_bytes_per_second(const uint8_t* buffer, int64_t bytes, int threads, double seconds);

// Multiplications and additions per second of the widest instruction for a kind: "int8" (u8 x s8 -> s32), "bf16", "fp32".
// Falls to the best instruction that the active level has; throws for an unknown kind.
double peak_operations_per_second(const std::string& kind, int threads, double seconds);

// One level's inner loops. Each returns something computed from its work, so that none of it can be left out.
struct Loops {
  uint64_t (*read)(const uint8_t* buffer, int64_t bytes);
  uint64_t (*int8)(int64_t rounds);
  uint64_t (*bf16)(int64_t rounds);
  uint64_t (*fp32)(int64_t rounds);
  int64_t int8_operations, bf16_operations, fp32_operations;   // of one round
};

namespace generic {
extern const Loops loops;
}
namespace avx2 {
extern const Loops loops;
}
namespace avx512 {
extern const Loops loops;
}
namespace avx512_bf16 {
extern const Loops loops;
}

}  // namespace tilewright::microbench
