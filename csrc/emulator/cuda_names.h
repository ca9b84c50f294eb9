// SPDX-License-Identifier: Apache-2.0
// CUDA's own names on the host: the words of the language, threadIdx and its kin, and the intrinsics that kernels use.
// Whatever lets threads meet or touches shared state is in the runtime; the rest is plain arithmetic, here.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "emulator/runtime.h"

#define __global__ __attribute__((visibility("default"), noinline))
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using dim3 = tilewright::emulator::Dim3;
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
inline constexpr int warpSize = 32;

// --- vectors, with CUDA's alignment: a misaligned access is an error of its own
#define TILEWRIGHT_VECTOR(Name, T, Align2, Align4)                   \
  struct alignas(Align2) Name##2 { T x, y; };                        \
  struct Name##3 { T x, y, z; };                                     \
  struct alignas(Align4) Name##4 { T x, y, z, w; };                  \
  inline Name##2 make_##Name##2(T x, T y) { return {x, y}; }         \
  inline Name##3 make_##Name##3(T x, T y, T z) { return {x, y, z}; } \
  inline Name##4 make_##Name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
TILEWRIGHT_VECTOR(char, signed char, 2, 4)
TILEWRIGHT_VECTOR(uchar, unsigned char, 2, 4)
TILEWRIGHT_VECTOR(short, short, 4, 8)
TILEWRIGHT_VECTOR(ushort, unsigned short, 4, 8)
TILEWRIGHT_VECTOR(int, int, 8, 16)
TILEWRIGHT_VECTOR(uint, unsigned, 8, 16)
TILEWRIGHT_VECTOR(float, float, 8, 16)
#undef TILEWRIGHT_VECTOR
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
struct alignas(16) double2 {
  double x, y;
};
inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// --- bits
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1; }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= ((x >> i) & 1u) << (31 - i);
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((((static_cast<uint64_t>(high) << 32) | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}
// A selector's bit 3 asks for the byte's sign in every bit.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = (selector >> (4 * i)) & 0xfu;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7u))) & 0xffu;
    if ((pick & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += ((a >> (8 * i)) & 0xffu) * ((b >> (8 * i)) & 0xffu);
  return c;
}
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __vadd4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (int i = 0; i < 32; i += 8) result |= (((a >> i) + (b >> i)) & 0xffu) << i;
  return static_cast<int>(result);
}
inline unsigned __vsub4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (int i = 0; i < 32; i += 8) result |= (((a >> i) - (b >> i)) & 0xffu) << i;
  return result;
}

// --- float arithmetic; the fast forms are as exact here as the plain ones
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __exp10f(float x) { return static_cast<float>(std::pow(10.0, static_cast<double>(x))); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanhf(float x) { return std::tanh(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }  // NaN becomes 0
inline int __float2int_rn(float x) {
  if (!(x == x)) return 0;
  const double rounded = std::nearbyint(static_cast<double>(x));
  return static_cast<int>(std::clamp(rounded, -2147483648.0, 2147483647.0));
}
inline int __float2int_rz(float x) {
  return x == x ? static_cast<int>(std::clamp(static_cast<double>(x), -2147483648.0, 2147483647.0)) : 0;
}
inline int __float2int_rd(float x) { return __float2int_rz(std::floor(x)); }
inline int __float2int_ru(float x) { return __float2int_rz(std::ceil(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// CUDA gives min and max for every pair of arithmetic types, without a namespace.
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// --- memory
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { tilewright::emulator::pause_thread(); }
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcs(T* pointer, std::type_identity_t<T> value) {
  *pointer = value;
}
template <class T>
void __stcg(T* pointer, std::type_identity_t<T> value) {
  *pointer = value;
}

namespace tilewright::emulator {

// One thread runs at a time, so a plain update is atomic. A thread that only looks (adds nothing, or fails to exchange)
// may be spinning: it lets the others run.
template <class T, class Update>
[[gnu::no_sanitize("thread")]] T atomic_update(T* pointer, Update update) {
  check_atomic(pointer, sizeof(T));
  const T old = *static_cast<volatile T*>(pointer);
  const T next = update(old);
  *static_cast<volatile T*>(pointer) = next;
  return old;
}

}  // namespace tilewright::emulator

template <class T>
T atomicAdd(T* pointer, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "sums by atomic addition depend on the order; only integers are allowed");
  if (value == T{0}) tilewright::emulator::pause_thread();
  return tilewright::emulator::atomic_update(pointer, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* pointer, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return tilewright::emulator::atomic_update(pointer, [&](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMax(T* pointer, std::type_identity_t<T> value) {
  return tilewright::emulator::atomic_update(pointer, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* pointer, std::type_identity_t<T> value) {
  return tilewright::emulator::atomic_update(pointer, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* pointer, std::type_identity_t<T> value) {
  return tilewright::emulator::atomic_update(pointer, [&](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicAnd(T* pointer, std::type_identity_t<T> value) {
  return tilewright::emulator::atomic_update(pointer, [&](T old) { return static_cast<T>(old & value); });
}
template <class T>
T atomicExch(T* pointer, std::type_identity_t<T> value) {
  return tilewright::emulator::atomic_update(pointer, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* pointer, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T old = tilewright::emulator::atomic_update(pointer, [&](T now) { return now == expected ? value : now; });
  if (old != expected) tilewright::emulator::pause_thread();
  return old;
}
inline unsigned atomicInc(unsigned* pointer, unsigned limit) {
  return tilewright::emulator::atomic_update(pointer, [&](unsigned old) { return old >= limit ? 0u : old + 1u; });
}

// --- threads of a block and of a warp
inline void __syncthreads() { tilewright::emulator::block_sync(); }
inline int __syncthreads_count(int predicate) { return tilewright::emulator::block_sync_count(predicate != 0); }
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { tilewright::emulator::sync_warp(mask); }
inline unsigned __activemask() { return tilewright::emulator::active_lanes(); }

namespace tilewright::emulator {

struct ShuffleLane {
  uint64_t in, out;
  int from;  // lane whose value this one wants
};
void shuffle(const char* name, uint32_t mask, ShuffleLane& lane);
struct VoteLane {
  int predicate;
  uint32_t ballot;
};
uint32_t vote(const char* name, uint32_t mask, bool predicate);
enum class Reduction { kAdd, kMin, kMax, kAnd, kOr, kXor };
uint32_t reduce(const char* name, uint32_t mask, uint32_t value, Reduction how, bool is_signed);
int lane_id();

template <class T>
T shuffle_from(const char* name, uint32_t mask, T value, int from) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic_v<T>, "CUDA shuffles 4 and 8 byte numbers");
  ShuffleLane lane{0, 0, from};
  std::memcpy(&lane.in, &value, sizeof(T));
  shuffle(name, mask, lane);
  T result;
  std::memcpy(&result, &lane.out, sizeof(T));
  return result;
}

}  // namespace tilewright::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = tilewright::emulator::lane_id();
  return tilewright::emulator::shuffle_from("__shfl_sync", mask, value, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = tilewright::emulator::lane_id(), from = lane ^ bits;
  const int last = lane | (width - 1);  // a higher group's value is out of reach
  return tilewright::emulator::shuffle_from("__shfl_xor_sync", mask, value, from > last ? lane : from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = tilewright::emulator::lane_id(), from = lane - static_cast<int>(delta);
  const int first = lane & ~(width - 1);
  return tilewright::emulator::shuffle_from("__shfl_up_sync", mask, value, from < first ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = tilewright::emulator::lane_id(), from = lane + static_cast<int>(delta);
  const int last = lane | (width - 1);
  return tilewright::emulator::shuffle_from("__shfl_down_sync", mask, value, from > last ? lane : from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return tilewright::emulator::vote("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return tilewright::emulator::vote("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return tilewright::emulator::vote("__all_sync", mask, predicate == 0) == 0;
}
#define TILEWRIGHT_REDUCE(Name, How)                                                                      \
  inline unsigned Name(unsigned mask, unsigned value) {                                                   \
    return tilewright::emulator::reduce(#Name, mask, value, tilewright::emulator::Reduction::How, false); \
  }                                                                                                       \
  inline int Name(unsigned mask, int value) {                                                             \
    return static_cast<int>(tilewright::emulator::reduce(#Name, mask, static_cast<unsigned>(value),       \
                                                         tilewright::emulator::Reduction::How, true));    \
  }
TILEWRIGHT_REDUCE(__reduce_add_sync, kAdd)
TILEWRIGHT_REDUCE(__reduce_min_sync, kMin)
TILEWRIGHT_REDUCE(__reduce_max_sync, kMax)
#undef TILEWRIGHT_REDUCE
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return tilewright::emulator::reduce("__reduce_or_sync", mask, value, tilewright::emulator::Reduction::kOr, false);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return tilewright::emulator::reduce("__reduce_and_sync", mask, value, tilewright::emulator::Reduction::kAnd, false);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return tilewright::emulator::reduce("__reduce_xor_sync", mask, value, tilewright::emulator::Reduction::kXor, false);
}
