// SPDX-License-Identifier: Apache-2.0
// Numbers, intrinsics, indices, and the order of threads.
#include <cmath>
#include <limits>

#include "cases.h"

namespace tilewright::emulator_tests {
namespace {

// --- conversions, against the compiler's own _Float16 and against a search for the nearest value

uint32_t next_bits(uint32_t& state) { return state = state * 1664525u + 1013904223u; }

bool halves_agree() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    _Float16 half;
    const auto low = static_cast<uint16_t>(bits);
    std::memcpy(&half, &low, 2);
    const float want = static_cast<float>(half), got = to_float(f16{low});
    if (std::isnan(want) != std::isnan(got) || (!std::isnan(want) && want != got)) return false;
  }
  uint32_t state = 1;
  for (int i = 0; i < 1000000; ++i) {
    const float value = bits_float(next_bits(state));
    if (std::isnan(value)) continue;
    const auto half = static_cast<_Float16>(value);
    uint16_t want;
    std::memcpy(&want, &half, 2);
    if (from_float<f16>(value).bits != want) return false;
  }
  return true;
}

// Of all codes the nearest in float64; of two the one with an even code.
template <class T, class Bits>
bool is_nearest(float value, T got, Bits last_finite) {
  const double distance = std::fabs(static_cast<double>(to_float(got)) - static_cast<double>(value));
  const Bits magnitude = got.bits & static_cast<Bits>(std::numeric_limits<Bits>::max() >> 1);
  for (const int step : {-1, 1}) {
    const int neighbour = magnitude + step;
    if (neighbour < 0 || neighbour > last_finite) continue;
    const T other{static_cast<Bits>((got.bits & ~(std::numeric_limits<Bits>::max() >> 1)) | neighbour)};
    const double farther = std::fabs(static_cast<double>(to_float(other)) - static_cast<double>(value));
    if (farther < distance || (farther == distance && magnitude % 2 != 0)) return false;
  }
  return true;
}

bool narrow_floats_agree() {
  uint32_t state = 3;
  for (int i = 0; i < 300000; ++i) {
    const float value = bits_float(next_bits(state));
    if (std::isfinite(value) && std::fabs(value) < 3e38f &&
        !is_nearest<bf16, uint16_t>(value, from_float<bf16>(value), 0x7f7f))
      return false;
    const float small = static_cast<float>(static_cast<int>(next_bits(state) >> 8)) * 0x1p-14f - 512.0f;
    if (!is_nearest<e4m3, uint8_t>(small, from_float<e4m3>(small), 0x7e)) return false;
    const float tiny = small * 0x1p-15f;
    if (!is_nearest<e4m3, uint8_t>(tiny, from_float<e4m3>(tiny), 0x7e)) return false;
    float values[4];
    unpack_e4m3x4(pack_e4m3x4(small, tiny, -small, -tiny), values);
    if (values[0] != -values[2] || values[1] != -values[3]) return false;
  }
  const float infinity = std::numeric_limits<float>::infinity();
  return to_float(from_float<e4m3>(infinity)) == 448.0f && to_float(from_float<e4m3>(-1e30f)) == -448.0f &&
         std::isnan(to_float(from_float<e4m3>(std::nanf("")))) &&
         std::isnan(to_float(from_float<bf16>(std::nanf("")))) && to_float(from_float<f16>(65520.0f)) == infinity &&
         to_float(from_float<f16>(65519.0f)) == 65504.0f;
}

bool tf32_rounds() {
  uint32_t state = 5;
  for (int i = 0; i < 100000; ++i) {
    const float value = static_cast<float>(static_cast<int>(next_bits(state))) * 0x1p-20f;
    const float rounded = round_tf32(value);
    if ((float_bits(rounded) & 0x1fffu) != 0) return false;
    if (std::fabs(rounded - value) > std::fabs(value) * 0x1p-11f) return false;
  }
  return round_tf32(1.0f + 0x1p-11f) == 1.0f + 0x1p-10f && round_tf32(-1.0f - 0x1p-11f) == -1.0f - 0x1p-10f;
}

// --- intrinsics

bool intrinsics_agree() {
  // The selector's nibbles from the lowest on choose bytes 0 to 7 of b:a; 8 more gives the byte's sign.
  if (__byte_perm(0x33221100u, 0x77665544u, 0x7531u) != 0x77553311u) return false;
  if (__byte_perm(0x33221100u, 0x77665544u, 0x0246u) != 0x00224466u) return false;
  if (__byte_perm(0x80017f00u, 0xff000000u, 0xfb98u) != 0xffff0000u) return false;
  if (__dp4a(0x01ff80'7f, static_cast<int>(0xff'02'03'04u), 10) != -1 - 2 - 384 + 508 + 10) return false;
  if (__dp4a(0x01ff807fu, 0xff020304u, 10u) != 255u + 510u + 384u + 508u + 10u) return false;
  if (__funnelshift_l(0x89abcdefu, 0x01234567u, 8) != 0x23456789u) return false;
  if (__funnelshift_r(0x89abcdefu, 0x01234567u, 8) != 0x6789abcdu) return false;
  if (__ffs(0) != 0 || __ffs(8) != 4 || __clz(1) != 31 || __clz(0) != 32 || __popc(0xf0f0u) != 8) return false;
  if (__brev(1u) != 0x80000000u || __umulhi(0x80000000u, 6u) != 3u || __mulhi(-2, 1) != -1) return false;
  if (__float2int_rn(2.5f) != 2 || __float2int_rn(-3.5f) != -4 || __float2int_rn(3e9f) != 2147483647) return false;
  if (__float2int_rz(-2.9f) != -2 || __float2int_rd(-2.1f) != -3 || __float2int_ru(2.1f) != 3) return false;
  if (min(2u, 3) != 2u || max(1.5f, 2) != 2.0f || max(-1, 4ll) != 4ll) return false;
  return rsqrtf(4.0f) == 0.5f && __saturatef(-2.0f) == 0.0f && __saturatef(std::nanf("")) == 0.0f;
}

// --- indices and order

struct IndexParams {
  int* seen;   // [blocks][threads]
  int* order;  // [blocks * threads]
  int* next;
};

__global__ void __launch_bounds__(96, 1) indices(const __grid_constant__ IndexParams p) {
  const int block = (static_cast<int>(blockIdx.z) * static_cast<int>(gridDim.y) + static_cast<int>(blockIdx.y)) *
                        static_cast<int>(gridDim.x) +
                    static_cast<int>(blockIdx.x);
  const int at = block * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  p.order[atomicAdd(p.next, 1)] = at;
  __syncwarp();
  atomicAdd(p.seen + at, 1 + cluster_rank());
}

std::vector<int> order_of(uint64_t seed, bool& once) {
  constexpr int kBlocks = 4 * 3 * 2, kAll = kBlocks * 96;
  Global<int> seen(kAll), order(kAll), next(1);
  const uint64_t before = std::exchange(emulator::current_settings().seed, seed);
  launch(indices, Grid{.blocks = {4, 3, 2}, .threads = 96, .cluster = 2},
         IndexParams{seen.data(), order.data(), next.data()});
  emulator::current_settings().seed = before;
  once = next[0] == kAll;
  std::vector<int> result;
  for (int i = 0; i < kAll; ++i) {
    once = once && seen[static_cast<size_t>(i)] == 1 + i / 96 % 4 % 2;
    result.push_back(order[static_cast<size_t>(i)]);
  }
  return result;
}

bool order_follows_the_seed() {
  bool once = false, twice = false, thrice = false;
  const std::vector<int> first = order_of(11, once), again = order_of(11, twice), other = order_of(12, thrice);
  return once && twice && thrice && first == again && first != other;
}

struct SumParams {
  const float* in;
  float* out;
  int count;
};

// More blocks than are resident at once, with a deep call on each stack.
TILEWRIGHT_DEVICE float climb(const float* in, int count) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = in[i % count];
  return count == 1 ? kept[63] : kept[count - 1] + climb(in, count - 1);
}

__global__ void __launch_bounds__(32, 1) many_blocks(const __grid_constant__ SumParams p) {
  float sum = climb(p.in, p.count);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x == 0) p.out[blockIdx.x] = sum;
}

bool run_many_blocks() {
  Global<float> in(60), out(700);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i + 1);
  launch(many_blocks, Grid{.blocks = {700}, .threads = 32}, SumParams{in.data(), out.data(), 60});
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] != 32.0f * 60 * 61 / 2) return false;  // each thread adds 1 to 60
  }
  return true;
}

bool run_nothing() {
  Global<float> in(1), out(1);
  launch(many_blocks, Grid{.blocks = {0}, .threads = 32}, SumParams{in.data(), out.data(), 1});
  return out[0] == 0.0f;
}

bool run_too_much_shared() {
  Global<float> in(1), out(1);
  launch(many_blocks, Grid{.threads = 32, .shared_bytes = kMaxSharedBytes + 1}, SumParams{in.data(), out.data(), 1});
  return true;
}

bool run_too_many_threads() {
  Global<float> in(1), out(1);
  launch(many_blocks, Grid{.threads = 1025}, SumParams{in.data(), out.data(), 1});
  return true;
}

}  // namespace

std::vector<Case> unit_cases() {
  return {
      {"float16", "", halves_agree},
      {"bfloat16 and e4m3", "", narrow_floats_agree},
      {"tf32", "", tf32_rounds},
      {"intrinsics", "", intrinsics_agree},
      {"order of threads", "", order_follows_the_seed},
      {"many blocks", "", run_many_blocks},
      {"no blocks", "", run_nothing},
      {"too much shared memory", "bytes of shared memory; a block has at most", run_too_much_shared},
      {"too many threads", "a block of 1025 threads", run_too_many_threads},
  };
}

}  // namespace tilewright::emulator_tests
