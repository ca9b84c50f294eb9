// SPDX-License-Identifier: Apache-2.0
// Every wrapper of csrc/hopper on a GPU, against plain loops: small integers, so that each result is exact in any type.
// Built and run by test_hopper_wrappers.py; prints one line a case and exits with the number of failures.
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "hopper/hopper.h"

using namespace tilewright::hopper;

namespace {

int failures = 0;

void report(const std::string& name, bool passed, const std::string& detail = "") {
  std::printf("%s %s %s\n", passed ? "pass" : "FAIL", name.c_str(), detail.c_str());
  failures += passed ? 0 : 1;
}

void cuda(cudaError_t status) { tilewright::require(status == cudaSuccess, cudaGetErrorString(status)); }

template <class T>
struct OnDevice {
  explicit OnDevice(const std::vector<T>& from) : count(from.size()) {
    cuda(cudaMalloc(&data, count * sizeof(T) + 16));
    cuda(cudaMemcpy(data, from.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnDevice() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> to(count);
    cuda(cudaMemcpy(to.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }
  T* data = nullptr;
  size_t count;
};

// A small integer as an element; e4m3 holds -8 to 8 exactly.
template <class T>
T element(int value) {
  if constexpr (std::is_same_v<T, tf32>) return {static_cast<float>(value)};
  if constexpr (std::is_same_v<T, int8_t> || std::is_same_v<T, uint8_t>) return static_cast<T>(value);
  if constexpr (sizeof(T) <= 2) {
    const float magnitude = static_cast<float>(value < 0 ? -value : value);
    uint32_t bits;
    std::memcpy(&bits, &magnitude, 4);
    const int exponent = static_cast<int>(bits >> 23) - 127;
    const uint32_t mantissa = bits & 0x7fffff;
    const uint32_t sign = value < 0 ? 1 : 0;
    if constexpr (std::is_same_v<T, bf16>) return {static_cast<uint16_t>(sign << 15 | bits >> 16)};
    if constexpr (std::is_same_v<T, f16>) {
      return {static_cast<uint16_t>(sign << 15 | (value == 0 ? 0 : (exponent + 15) << 10 | mantissa >> 13))};
    }
    if constexpr (std::is_same_v<T, e4m3>) {
      return {static_cast<uint8_t>(sign << 7 | (value == 0 ? 0 : (exponent + 7) << 3 | mantissa >> 20))};
    }
  }
  return {};
}

int integer(uint32_t& seed, bool is_unsigned) {
  seed = seed * 1664525u + 1013904223u;
  return is_unsigned ? static_cast<int>(seed >> 24) % 9 : static_cast<int>(seed >> 24) % 9 - 4;
}

template <class A, class B, class D>
struct ProductParams {
  const A* a;  // [64, 2 depths]
  const B* b;  // [N, 2 depths]
  D* d;
};

template <class A, class B, int N, Major MA, Major MB, Swizzle S, bool FromRegisters>
__global__ void __launch_bounds__(128, 1)
    product(const __grid_constant__ ProductParams<A, B, typename Wgmma<A, B, N, MA, MB>::D> p) {
  using Product = Wgmma<A, B, N, MA, MB>;
  constexpr int kDepth = Product::kDepth;
  constexpr int kPanel = panel_bytes(S) / static_cast<int>(sizeof(A));
  constexpr int kK = 2 * kDepth > kPanel ? 2 * kDepth : kPanel;  // a whole panel; the rest is not read
  constexpr int kN = (N + kPanel - 1) / kPanel * kPanel;
  using TileA = std::conditional_t<MA == Major::kK, Tile<A, 64, kK, S>, Tile<A, kK, 64, S>>;
  using TileB = std::conditional_t<MB == Major::kK, Tile<B, N, kK, S>, Tile<B, kK, kN, S>>;
  char* const tile_a = shared_memory();
  char* const tile_b = shared_memory() + (TileA::kBytes + 1023) / 1024 * 1024;
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 2 * kDepth; i += 128) {
    const int row = i / (2 * kDepth), k = i % (2 * kDepth);
    *(MA == Major::kK ? TileA::at(tile_a, row, k) : TileA::at(tile_a, k, row)) = p.a[i];
  }
  for (int i = static_cast<int>(threadIdx.x); i < N * 2 * kDepth; i += 128) {
    const int row = i / (2 * kDepth), k = i % (2 * kDepth);
    *(MB == Major::kK ? TileB::at(tile_b, row, k) : TileB::at(tile_b, k, row)) = p.b[i];
  }
  fence_async_shared();
  __syncthreads();

  typename Product::D d[Product::kRegisters];
#pragma unroll
  for (int i = 0; i < Product::kRegisters; ++i) d[i] = 77;  // replaced: the first product does not accumulate
  uint32_t fragment[2][4];
  const int thread = static_cast<int>(threadIdx.x);
  for (int step = 0; step < 2; ++step) {
    for (int j = 0; j < 4; ++j) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (j % 2);
      const int byte = 4 * (thread % 4) + 16 * (j / 2);
      const A* from = p.a + row * 2 * kDepth + step * kDepth + byte / static_cast<int>(sizeof(A));
      fragment[step][j] = *reinterpret_cast<const uint32_t*>(from);
    }
  }
  keep(fragment[0]);
  keep(fragment[1]);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const Descriptor b =
        MB == Major::kK ? TileB::k_major(tile_b, 0, step * kDepth) : TileB::mn_major(tile_b, step * kDepth, 0);
    if constexpr (FromRegisters) {
      Product::run(d, fragment[step], b, step > 0);
    } else {
      const Descriptor a =
          MA == Major::kK ? TileA::k_major(tile_a, 0, step * kDepth) : TileA::mn_major(tile_a, step * kDepth, 0);
      Product::run(d, a, b, step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(d);
#pragma unroll
  for (int i = 0; i < Product::kRegisters; ++i) {
    p.d[accumulator_row(thread, i) * N + accumulator_col(thread, i)] = d[i];
  }
}

template <class T>
const char* type_name() {
  return std::is_same_v<T, bf16>      ? "bf16"
         : std::is_same_v<T, f16>     ? "f16"
         : std::is_same_v<T, e4m3>    ? "e4m3"
         : std::is_same_v<T, tf32>    ? "tf32"
         : std::is_same_v<T, uint8_t> ? "u8"
                                      : "s8";
}

template <class A, class B, int N, Major MA, Major MB, Swizzle S, bool FromRegisters>
void check_product() {
  using Product = Wgmma<A, B, N, MA, MB>;
  using D = typename Product::D;
  constexpr int kK = 2 * Product::kDepth;
  uint32_t seed = 1;
  std::vector<int> a(64 * kK), b(static_cast<size_t>(N) * kK);
  for (int& x : a) x = integer(seed, std::is_same_v<A, uint8_t>);
  for (int& x : b) x = integer(seed, std::is_same_v<B, uint8_t>);
  std::vector<A> ea;
  std::vector<B> eb;
  for (int x : a) ea.push_back(element<A>(x));
  for (int x : b) eb.push_back(element<B>(x));
  OnDevice<A> da(ea);
  OnDevice<B> db(eb);
  OnDevice<D> dd(std::vector<D>(64 * N, D(-1)));
  launch(product<A, B, N, MA, MB, S, FromRegisters>, Grid{.threads = 128, .shared_bytes = 150 * 1024},
         ProductParams<A, B, D>{da.data, db.data, dd.data});
  cuda(cudaDeviceSynchronize());
  const std::vector<D> got = dd.host();
  int wrong = 0;
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < N; ++n) {
      int sum = 0;
      for (int k = 0; k < kK; ++k) sum += a[static_cast<size_t>(m * kK + k)] * b[static_cast<size_t>(n * kK + k)];
      wrong += got[static_cast<size_t>(m * N + n)] == static_cast<D>(sum) ? 0 : 1;
    }
  }
  report(std::string("wgmma ") + type_name<A>() + " " + type_name<B>() + " n" + std::to_string(N) + " swizzle " +
             std::to_string(static_cast<int>(S)) + (MA == Major::kK ? " A k" : " A mn") +
             (MB == Major::kK ? " B k" : " B mn") + (FromRegisters ? " registers" : " shared"),
         wrong == 0, std::to_string(wrong) + " wrong");
}

template <class A, class B, Major MA, Major MB, bool FromRegisters>
void check_swizzles() {
  check_product<A, B, 64, MA, MB, Swizzle::kNone, FromRegisters>();
  check_product<A, B, 64, MA, MB, Swizzle::k32, FromRegisters>();
  check_product<A, B, 64, MA, MB, Swizzle::k64, FromRegisters>();
  check_product<A, B, 64, MA, MB, Swizzle::k128, FromRegisters>();
}

template <class A, class B>
void check_type() {
  check_swizzles<A, B, Major::kK, Major::kK, false>();
  check_swizzles<A, B, Major::kK, Major::kK, true>();
  check_product<A, B, 8, Major::kK, Major::kK, Swizzle::k128, true>();
  check_product<A, B, 24, Major::kK, Major::kK, Swizzle::k128, false>();
  check_product<A, B, 160, Major::kK, Major::kK, Swizzle::k128, false>();
  check_product<A, B, 256, Major::kK, Major::kK, Swizzle::k128, true>();
}

struct CopyParams {
  TensorMap from, to;
  uint16_t* physical;  // the tile as it lies in shared memory
};

using CopyTile = Tile<bf16, 16, 64, Swizzle::k128>;

// A box that hangs over the tensor's end, its bytes in shared memory, and back out through a store.
__global__ void __launch_bounds__(128, 1) copy_box(const __grid_constant__ CopyParams p) {
  char* const tile = shared_memory();
  Barrier& full = *reinterpret_cast<Barrier*>(shared_memory() + CopyTile::kBytes);
  if (threadIdx.x == 0) {
    init(full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_expect(full, CopyTile::kBytes);
    load_tile(tile, p.from, full, 8, 4);
  }
  wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < CopyTile::kBytes / 2; i += 128) {
    p.physical[i] = reinterpret_cast<const uint16_t*>(tile)[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    store_tile(p.to, tile, 8, 4);
    store_commit();
    store_wait_all();
  }
}

void check_copies() {
  constexpr int kRows = 13, kCols = 48;  // rows of 96 bytes; the box reaches past both ends
  std::vector<uint16_t> source(kRows * kCols);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint16_t>(i + 1);
  OnDevice<uint16_t> from(source), to(std::vector<uint16_t>(source.size(), 0)),
      physical(std::vector<uint16_t>(16 * 64));
  const uint64_t sizes[2] = {kCols, kRows}, strides[1] = {kCols * 2};
  const uint32_t box[2] = {64, 16};
  CopyParams p{make_tensor_map<bf16>(from.data, 2, sizes, strides, box, Swizzle::k128),
               make_tensor_map<bf16>(to.data, 2, sizes, strides, box, Swizzle::k128), physical.data};
  launch(copy_box, Grid{.threads = 128, .shared_bytes = CopyTile::kBytes + 64}, p);
  cuda(cudaDeviceSynchronize());
  const auto lies = physical.host(), back = to.host();
  int wrong = 0, lost = 0;
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 64; ++col) {
      const bool inside = row + 4 < kRows && col + 8 < kCols;
      const uint16_t want = inside ? source[static_cast<size_t>((row + 4) * kCols + col + 8)] : 0;
      wrong += lies[CopyTile::offset(row, col) / 2] == want ? 0 : 1;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int col = 0; col < kCols; ++col) {
      const size_t i = static_cast<size_t>(row * kCols + col);
      lost += back[i] == (row >= 4 && col >= 8 ? source[i] : 0) ? 0 : 1;
    }
  }
  report("tma load, swizzle and fill", wrong == 0, std::to_string(wrong) + " wrong");
  report("tma store, nothing outside", lost == 0, std::to_string(lost) + " wrong");
}

struct WarpParams {
  float* d;
  uint32_t* loaded;
  uint16_t* stored;
};

// ldmatrix and stmatrix round trips and each mma.sync on all-ones and index patterns.
__global__ void __launch_bounds__(32, 1) warp_pieces(const __grid_constant__ WarpParams p) {
  auto* const tile = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) tile[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, tile + lane * 8);
  for (int j = 0; j < 4; ++j) p.loaded[lane * 8 + j] = r[j];
  ldmatrix_x4_transposed(r, tile + lane * 8);
  for (int j = 0; j < 4; ++j) p.loaded[lane * 8 + 4 + j] = r[j];
  __syncwarp();
  stmatrix_x4_transposed(tile + lane * 8, r);  // undoes the transposed load
  __syncwarp();
  for (int i = lane; i < 256; i += 32) p.stored[i] = tile[i];
  // Row i of A holds (i % 4) + 1 everywhere, column j of B holds (j % 3) - 1: d[i][j] = K times their product.
  const int row = lane / 4, col = lane / 4;
  const float low = static_cast<float>(row % 4 + 1), high = static_cast<float>((row + 8) % 4 + 1);
  const float right = static_cast<float>(col % 3 - 1);
  float d[4] = {0, 0, 0, 0};
  int32_t e[4] = {0, 0, 0, 0};
  {
    const uint32_t a[4] = {pack_bf16x2(low, low), pack_bf16x2(high, high), pack_bf16x2(low, low),
                           pack_bf16x2(high, high)};
    const uint32_t b[2] = {pack_bf16x2(right, right), pack_bf16x2(right, right)};
    mma_m16n8k16(d, a, b, bf16{});
  }
  {
    const uint32_t a[4] = {pack_f16x2(low, low), pack_f16x2(high, high), pack_f16x2(low, low), pack_f16x2(high, high)};
    const uint32_t b[2] = {pack_f16x2(right, right), pack_f16x2(right, right)};
    mma_m16n8k16(d, a, b, f16{});
  }
  {
    const uint32_t a[4] = {float_bits(low), float_bits(high), float_bits(low), float_bits(high)};
    const uint32_t b[2] = {float_bits(right), float_bits(right)};
    mma_m16n8k8_tf32(d, a, b);
  }
  {
    const uint32_t l = pack_e4m3x4(low, low, low, low), h = pack_e4m3x4(high, high, high, high);
    const uint32_t a[4] = {l, h, l, h}, w = pack_e4m3x4(right, right, right, right), b[2] = {w, w};
    mma_m16n8k32_e4m3(d, a, b);
  }
  {
    const uint32_t l = 0x01010101u * static_cast<uint32_t>(low), h = 0x01010101u * static_cast<uint32_t>(high);
    const uint32_t w = 0x01010101u * static_cast<uint8_t>(static_cast<int8_t>(right));
    const uint32_t a[4] = {l, h, l, h}, b[2] = {right < 0 ? 0xffffffffu : w, right < 0 ? 0xffffffffu : w};
    mma_m16n8k32_s8s8(e, a, b);
    mma_m16n8k32_u8s8(e, a, b);
  }
  for (int i = 0; i < 4; ++i) {
    p.d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = d[i] + static_cast<float>(e[i]);
  }
}

void check_warp() {
  OnDevice<float> d(std::vector<float>(128, -1));
  OnDevice<uint32_t> loaded(std::vector<uint32_t>(256, 0));
  OnDevice<uint16_t> stored(std::vector<uint16_t>(256, 0));
  launch(warp_pieces, Grid{.threads = 32, .shared_bytes = 1024}, WarpParams{d.data, loaded.data, stored.data});
  cuda(cudaDeviceSynchronize());
  const auto result = d.host();
  const auto registers = loaded.host();
  const auto tile = stored.host();
  int wrong = 0;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      const float want = static_cast<float>((16 + 16 + 8 + 32 + 32 + 32) * (i % 4 + 1) * (j % 3 - 1));
      wrong += result[static_cast<size_t>(i * 8 + j)] == want ? 0 : 1;
    }
  }
  report("mma.sync, all types", wrong == 0, std::to_string(wrong) + " wrong");
  wrong = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t j = 0; j < 4; ++j) {
      const uint32_t plain = j * 64 + lane / 4 * 8 + lane % 4 * 2, across = j * 64 + lane % 4 * 2 * 8 + lane / 4;
      wrong += registers[lane * 8 + j] == (plain | (plain + 1) << 16) ? 0 : 1;
      wrong += registers[lane * 8 + 4 + j] == (across | (across + 8) << 16) ? 0 : 1;
    }
  }
  report("ldmatrix, plain and transposed", wrong == 0, std::to_string(wrong) + " wrong");
  wrong = 0;
  for (uint16_t i = 0; i < 256; ++i) wrong += tile[i] == i ? 0 : 1;
  report("stmatrix, transposed back", wrong == 0, std::to_string(wrong) + " wrong");
}

}  // namespace

int main() {
  try {
    check_copies();
    check_warp();
    check_type<bf16, bf16>();
    check_type<f16, f16>();
    check_type<e4m3, e4m3>();
    check_type<tf32, tf32>();
    check_type<int8_t, int8_t>();
    check_type<uint8_t, int8_t>();
    check_type<int8_t, uint8_t>();
    check_swizzles<bf16, bf16, Major::kMN, Major::kMN, false>();
    check_swizzles<f16, f16, Major::kK, Major::kMN, true>();
    check_swizzles<bf16, bf16, Major::kMN, Major::kK, false>();
    check_product<bf16, bf16, 256, Major::kK, Major::kMN, Swizzle::k128, true>();
    check_product<bf16, bf16, 128, Major::kMN, Major::kMN, Swizzle::k128, false>();
  } catch (const std::exception& error) {
    report("stopped", false, error.what());
  }
  std::printf("%d failures\n", failures);
  return failures;
}
