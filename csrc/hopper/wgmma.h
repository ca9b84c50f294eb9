// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warpgroup: D[64, N] (+)= A[64, kDepth] B[N, kDepth]^T, asynchronous, A from registers or shared
// memory, B from shared memory.
//
// Order of use: wgmma_fence() once the registers involved are written, any number of run(), wgmma_commit(), and
// wgmma_wait<Pending>() before the accumulators are read. keep() stops the compiler from moving them in between.
//
// Thread t of the warpgroup (w = t / 32, l = t % 32) holds of D: register i is row 16 w + l / 4 + 8 ((i / 2) % 2), column
// 8 (i / 4) + 2 (l % 4) + i % 2. Of A in registers, word j of 4: row 16 w + l / 4 + 8 (j % 2), bytes 4 (l % 4) to
// 4 (l % 4) + 3 of the half j / 2 of the 32 bytes that a row has.
#pragma once

#include "hopper/operands.h"
#include "hopper/shared.h"

namespace tilewright::hopper {

enum class Major : int { kK = 0, kMN = 1 };  // which dimension of the operand has adjacent elements

TILEWRIGHT_BOTH int accumulator_row(int thread, int i) {
  return (thread % 128) / 32 * 16 + (thread % 32) / 4 + 8 * ((i / 2) % 2);
}
TILEWRIGHT_BOTH int accumulator_col(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

namespace detail {

// One instruction for element types A and B and width N; defined below for those that exist.
template <class A, class B, int N>
struct WgmmaInstruction;

template <class T>
inline constexpr bool kTransposable = false;
template <>
inline constexpr bool kTransposable<bf16> = true;
template <>
inline constexpr bool kTransposable<f16> = true;

template <class T>
struct WgmmaResult {
  using Type = float;
};
template <>
struct WgmmaResult<int8_t> {
  using Type = int32_t;
};
template <>
struct WgmmaResult<uint8_t> {
  using Type = int32_t;
};

}  // namespace detail

#if defined(__CUDACC__)

TILEWRIGHT_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TILEWRIGHT_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
TILEWRIGHT_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

template <int Count>
TILEWRIGHT_DEVICE void keep(float (&registers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int Count>
TILEWRIGHT_DEVICE void keep(int32_t (&registers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
template <int Count>
TILEWRIGHT_DEVICE void keep(uint32_t (&registers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

namespace detail {

// clang-format off
#define TILEWRIGHT_FLOAT_OPERAND(x) "+f"(x)
#define TILEWRIGHT_INT_OPERAND(x) "+r"(x)
#define TILEWRIGHT_WGMMA(N, COUNT, K, TYPES, FLAGS) \
  "wgmma.mma_async.sync.aligned.m64n" #N K TYPES " {" TILEWRIGHT_LIST_##COUNT "}, "
#define TILEWRIGHT_PREDICATE(p) "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\n"

// P0 to P6 are the operand numbers behind the accumulators: COUNT, COUNT + 1, ...
#define TILEWRIGHT_WGMMA_TRANSPOSABLE(T, K, TYPES, N, COUNT, P0, P1, P2, P3, P4, P5, P6)                               \
  template <> struct WgmmaInstruction<T, T, N> {                                                                       \
    template <int TA, int TB>                                                                                          \
    static TILEWRIGHT_DEVICE void run(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {                     \
      asm volatile(TILEWRIGHT_PREDICATE(P2) TILEWRIGHT_WGMMA(N, COUNT, K, TYPES, )                                     \
                   P0 ", " P1 ", p, 1, 1, " P3 ", " P4 ";\n}"                                                          \
                   : TILEWRIGHT_OPERANDS_##COUNT(TILEWRIGHT_FLOAT_OPERAND)                                             \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB) : "memory");                                    \
    }                                                                                                                  \
    template <int TB>                                                                                                  \
    static TILEWRIGHT_DEVICE void run(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, int accumulate) {         \
      asm volatile(TILEWRIGHT_PREDICATE(P5) TILEWRIGHT_WGMMA(N, COUNT, K, TYPES, )                                     \
                   "{" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, " P6 ";\n}"                                     \
                   : TILEWRIGHT_OPERANDS_##COUNT(TILEWRIGHT_FLOAT_OPERAND)                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TB) : "memory");         \
    }                                                                                                                  \
  };
#define TILEWRIGHT_WGMMA_FIXED(A, B, D, CONSTRAINT, K, TYPES, SIGNS, N, COUNT, P0, P1, P2, P3, P4, P5, P6)             \
  template <> struct WgmmaInstruction<A, B, N> {                                                                       \
    template <int TA, int TB>                                                                                          \
    static TILEWRIGHT_DEVICE void run(D (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {                         \
      asm volatile(TILEWRIGHT_PREDICATE(P2) TILEWRIGHT_WGMMA(N, COUNT, K, TYPES, ) P0 ", " P1 ", p" SIGNS ";\n}"       \
                   : TILEWRIGHT_OPERANDS_##COUNT(CONSTRAINT)                                                           \
                   : "l"(a), "l"(b), "r"(accumulate) : "memory");                                                      \
    }                                                                                                                  \
    template <int TB>                                                                                                  \
    static TILEWRIGHT_DEVICE void run(D (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, int accumulate) {             \
      asm volatile(TILEWRIGHT_PREDICATE(P5) TILEWRIGHT_WGMMA(N, COUNT, K, TYPES, )                                     \
                   "{" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p" SIGNS ";\n}"                                          \
                   : TILEWRIGHT_OPERANDS_##COUNT(CONSTRAINT)                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate) : "memory");                  \
    }                                                                                                                  \
  };

#define TILEWRIGHT_WGMMA_ALL(...)                                                                                      \
  TILEWRIGHT_WGMMA_TRANSPOSABLE(bf16, "k16", ".f32.bf16.bf16", __VA_ARGS__)                                            \
  TILEWRIGHT_WGMMA_TRANSPOSABLE(f16, "k16", ".f32.f16.f16", __VA_ARGS__)                                               \
  TILEWRIGHT_WGMMA_FIXED(tf32, tf32, float, TILEWRIGHT_FLOAT_OPERAND, "k8", ".f32.tf32.tf32", ", 1, 1", __VA_ARGS__)   \
  TILEWRIGHT_WGMMA_FIXED(e4m3, e4m3, float, TILEWRIGHT_FLOAT_OPERAND, "k32", ".f32.e4m3.e4m3", ", 1, 1", __VA_ARGS__)  \
  TILEWRIGHT_WGMMA_FIXED(int8_t, int8_t, int32_t, TILEWRIGHT_INT_OPERAND, "k32", ".s32.s8.s8", "", __VA_ARGS__)        \
  TILEWRIGHT_WGMMA_FIXED(uint8_t, int8_t, int32_t, TILEWRIGHT_INT_OPERAND, "k32", ".s32.u8.s8", "", __VA_ARGS__)       \
  TILEWRIGHT_WGMMA_FIXED(int8_t, uint8_t, int32_t, TILEWRIGHT_INT_OPERAND, "k32", ".s32.s8.u8", "", __VA_ARGS__)

TILEWRIGHT_WGMMA_ALL(8, 4, "%4", "%5", "%6", "%7", "%8", "%9", "%10")
TILEWRIGHT_WGMMA_ALL(16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
TILEWRIGHT_WGMMA_ALL(24, 12, "%12", "%13", "%14", "%15", "%16", "%17", "%18")
TILEWRIGHT_WGMMA_ALL(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
TILEWRIGHT_WGMMA_ALL(48, 24, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
TILEWRIGHT_WGMMA_ALL(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
TILEWRIGHT_WGMMA_ALL(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
TILEWRIGHT_WGMMA_ALL(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
TILEWRIGHT_WGMMA_ALL(160, 80, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
TILEWRIGHT_WGMMA_ALL(192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
TILEWRIGHT_WGMMA_ALL(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef TILEWRIGHT_WGMMA_ALL
#undef TILEWRIGHT_WGMMA_FIXED
#undef TILEWRIGHT_WGMMA_TRANSPOSABLE
#undef TILEWRIGHT_PREDICATE
#undef TILEWRIGHT_WGMMA
#undef TILEWRIGHT_INT_OPERAND
#undef TILEWRIGHT_FLOAT_OPERAND
// clang-format on

}  // namespace detail

#else
#include "emulator/wgmma.h"
#endif

template <class A, class B, int N, Major MA = Major::kK, Major MB = Major::kK>
struct Wgmma {
  static_assert(sizeof(A) == sizeof(B), "both operands have elements of one width");
  static_assert((MA == Major::kK || detail::kTransposable<A>) && (MB == Major::kK || detail::kTransposable<B>),
                "only 16-bit operands may lie with M or N adjacent");
  using D = typename detail::WgmmaResult<A>::Type;
  static constexpr int kRegisters = N / 2;
  static constexpr int kDepth = 32 / static_cast<int>(sizeof(A));

  static TILEWRIGHT_DEVICE void run(D (&d)[kRegisters], Descriptor a, Descriptor b, bool accumulate) {
    detail::WgmmaInstruction<A, B, N>::template run<static_cast<int>(MA), static_cast<int>(MB)>(d, a.bits, b.bits,
                                                                                                accumulate);
  }
  static TILEWRIGHT_DEVICE void run(D (&d)[kRegisters], const uint32_t (&a)[4], Descriptor b, bool accumulate) {
    detail::WgmmaInstruction<A, B, N>::template run<static_cast<int>(MB)>(d, a, b.bits, accumulate);
  }
};

}  // namespace tilewright::hopper
