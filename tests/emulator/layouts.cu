// SPDX-License-Identifier: Apache-2.0
// The emulator's fragments, descriptors and swizzles, and csrc/hopper's tiles, against the tables of cute_tables.cpp: operands
// lie where CuTe puts them and are described as CuTe describes them; the products must come out right.
#include <cstdio>
#include <fstream>
#include <sstream>

#include "cases.h"

namespace tilewright::emulator_tests {
namespace {

struct Fragment {
  std::string name;
  int threads = 0, values = 0;
  std::vector<int> index;
  int at(int thread, int value) const { return index[static_cast<size_t>(thread * values + value)]; }
};

struct Operand {
  int bytes = 0, swizzle = 0, rows = 0, depth = 0;
  std::string major;
  unsigned long long descriptor = 0;
  int start[2] = {0, 0};
  std::vector<int> offset;
};

struct Tables {
  std::vector<Fragment> fragments;
  std::vector<Operand> operands;
  const Fragment& fragment(const std::string& name) const {
    for (const Fragment& f : fragments) {
      if (f.name == name) return f;
    }
    fail("the tables have no fragment ", name);
  }
};

Tables read_tables(const std::string& path) {
  Tables tables;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string kind;
    words >> kind;
    std::vector<int>* rest = nullptr;
    if (kind == "fragment") {
      Fragment& f = tables.fragments.emplace_back();
      words >> f.name >> f.threads >> f.values;
      rest = &f.index;
    } else if (kind == "operand") {
      Operand& o = tables.operands.emplace_back();
      words >> o.bytes >> o.major >> o.swizzle >> o.rows >> o.depth >> o.descriptor >> o.start[0] >> o.start[1];
      rest = &o.offset;
    } else {
      continue;
    }
    for (int value; words >> value;) rest->push_back(value);
  }
  return tables;
}

int left(int m, int k) { return (m * 7 + k * 3 + m / 9) % 9 - 4; }
int right(int n, int k) { return (n * 5 + k * 11 + n / 7) % 9 - 4; }

template <class T>
T number(int value) {
  if constexpr (std::is_same_v<T, int8_t>) return static_cast<int8_t>(value);
  if constexpr (std::is_same_v<T, tf32>) return {static_cast<float>(value)};
  if constexpr (!std::is_same_v<T, int8_t> && !std::is_same_v<T, tf32>) return from_float<T>(static_cast<float>(value));
}

template <class D>
struct LayoutParams {
  const uint32_t* image;  // of shared memory, if any
  const uint32_t* fragment;  // [128][2 steps][4], if A is in registers
  D* d;  // [128][N / 2]
  int words;
  int a[2], b[2];  // starts in bytes
  uint64_t a_bits, b_bits;
};

template <class T, int N, Major MA, Major MB, bool kFromRegisters>
__global__ void __launch_bounds__(128, 1)
    laid_out(const __grid_constant__ LayoutParams<typename Wgmma<T, T, N, MA, MB>::D> p) {
  using Product = Wgmma<T, T, N, MA, MB>;
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t; i < p.words; i += 128) reinterpret_cast<uint32_t*>(shared_memory())[i] = p.image[i];
  fence_async_shared();
  __syncthreads();
  typename Product::D d[Product::kRegisters];
  uint32_t fragment[2][4];
  for (int i = 0; i < Product::kRegisters; ++i) d[i] = 1;
  if (kFromRegisters) {
    for (int i = 0; i < 8; ++i) fragment[i / 4][i % 4] = p.fragment[t * 8 + i];
  }
  wgmma_fence();
  for (int step = 0; step < 2; ++step) {
    const auto at = [&](uint64_t bits, int start) {
      return Descriptor{bits | shared_address(shared_memory() + start) >> 4};
    };
    if constexpr (kFromRegisters) {
      Product::run(d, fragment[step], at(p.b_bits, p.b[step]), step > 0);
    } else {
      Product::run(d, at(p.a_bits, p.a[step]), at(p.b_bits, p.b[step]), step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < Product::kRegisters; ++i) p.d[t * Product::kRegisters + i] = d[i];
}

constexpr int kImageBytes = 65536;

// Puts an operand's elements where the table says, `base` bytes on.
template <class T>
void place(const Operand& operand, int (*value)(int, int), char* image, int base) {
  for (int row = 0; row < operand.rows; ++row) {
    for (int k = 0; k < operand.depth; ++k) {
      const T element = number<T>(value(row, k));
      std::memcpy(image + base + operand.offset[static_cast<size_t>(row * operand.depth + k)], &element, sizeof(T));
    }
  }
}

template <class D>
bool right_result(const Global<D>& d, const Fragment& c, int depth) {
  for (int t = 0; t < c.threads; ++t) {
    for (int v = 0; v < c.values; ++v) {
      const int rows = c.threads == 128 ? 64 : 16, m = c.at(t, v) % rows, n = c.at(t, v) / rows;
      int sum = 0;
      for (int k = 0; k < depth; ++k) sum += left(m, k) * right(n, k);
      if (d[static_cast<size_t>(t * c.values + v)] != static_cast<D>(sum)) return false;
    }
  }
  return true;
}

template <class T, int N, Major MA, Major MB>
bool operands_agree(const Tables& tables, const Operand& a, const Operand& b) {
  using D = typename Wgmma<T, T, N, MA, MB>::D;
  Global<uint32_t> image(kImageBytes / 4);
  auto* const bytes = reinterpret_cast<char*>(image.data());
  place<T>(a, left, bytes, 0);
  place<T>(b, right, bytes, kImageBytes / 2);
  Global<D> d(128 * N / 2);
  LayoutParams<D> p{image.data(), nullptr, d.data(), kImageBytes / 4, {}, {}, a.descriptor, b.descriptor};
  for (int step = 0; step < 2; ++step) {
    p.a[step] = a.start[step];
    p.b[step] = kImageBytes / 2 + b.start[step];
  }
  launch(laid_out<T, N, MA, MB, false>, Grid{.threads = 128, .shared_bytes = kImageBytes}, p);
  return right_result(d, tables.fragment("wgmma" + std::to_string(N) + ".C"), a.depth);
}

template <class T, int N>
bool fragments_agree(const Tables& tables, const Operand& b) {
  using D = typename Wgmma<T, T, N>::D;
  constexpr int kDepth = Wgmma<T, T, N>::kDepth, kPerWord = 4 / static_cast<int>(sizeof(T));
  const Fragment& a = tables.fragment("wgmma" + std::to_string(sizeof(T)) + ".A");
  const Fragment& c = tables.fragment("wgmma" + std::to_string(N) + ".C");
  Global<uint32_t> image(kImageBytes / 4), words(128 * 8);
  place<T>(b, right, reinterpret_cast<char*>(image.data()), 0);
  for (int t = 0; t < 128; ++t) {
    for (int v = 0; v < 8 * kPerWord; ++v) {
      const int step = v / (4 * kPerWord), within = v % (4 * kPerWord), index = a.at(t, within);
      const T element = number<T>(left(index % 64, index / 64 + step * kDepth));
      std::memcpy(reinterpret_cast<char*>(words.data()) + (t * 8 * kPerWord + v) * static_cast<int>(sizeof(T)),
                  &element, sizeof(T));
    }
  }
  Global<D> d(128 * N / 2);
  LayoutParams<D> p{image.data(), words.data(), d.data(), kImageBytes / 4, {}, {b.start[0], b.start[1]}, 0,
                    b.descriptor};
  launch(laid_out<T, N, Major::kK, Major::kK, true>, Grid{.threads = 128, .shared_bytes = kImageBytes}, p);
  return right_result(d, c, b.depth);
}

// --- mma.sync

template <class D>
struct WarpLayoutParams {
  const uint32_t *a, *b;  // [32][4], [32][2]
  D* d;  // [32][4]
};

template <class T, class D>
__global__ void __launch_bounds__(32, 1) warp_product(const __grid_constant__ WarpLayoutParams<D> p) {
  const int t = static_cast<int>(threadIdx.x);
  uint32_t a[4], b[2];
  D d[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) a[i] = p.a[t * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = p.b[t * 2 + i];
  if constexpr (std::is_same_v<T, bf16> || std::is_same_v<T, f16>) mma_m16n8k16(d, a, b, T{});
  if constexpr (std::is_same_v<T, tf32>) mma_m16n8k8_tf32(d, a, b);
  if constexpr (std::is_same_v<T, e4m3>) mma_m16n8k32_e4m3(d, a, b);
  if constexpr (std::is_same_v<T, int8_t>) mma_m16n8k32_s8s8(d, a, b);
  for (int i = 0; i < 4; ++i) p.d[t * 4 + i] = d[i];
}

template <class T>
bool warp_agrees(const Tables& tables, const std::string& name) {
  using D = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  Global<uint32_t> a(128), b(64);
  Global<D> d(128);
  const Fragment &fa = tables.fragment(name + ".A"), &fb = tables.fragment(name + ".B");
  for (int t = 0; t < 32; ++t) {
    for (int v = 0; v < 4 * kPerWord; ++v) {
      const T element = number<T>(left(fa.at(t, v) % 16, fa.at(t, v) / 16));
      std::memcpy(reinterpret_cast<T*>(a.data()) + t * 4 * kPerWord + v, &element, sizeof(T));
    }
    for (int v = 0; v < 2 * kPerWord; ++v) {
      const T element = number<T>(right(fb.at(t, v) % 8, fb.at(t, v) / 8));
      std::memcpy(reinterpret_cast<T*>(b.data()) + t * 2 * kPerWord + v, &element, sizeof(T));
    }
  }
  launch(warp_product<T, D>, Grid{.threads = 32}, WarpLayoutParams<D>{a.data(), b.data(), d.data()});
  return right_result(d, tables.fragment(name + ".C"), 32 / static_cast<int>(sizeof(T)));
}

// --- csrc/hopper's own tiles: same places, same descriptors

template <class T, Swizzle S>
bool tile_agrees(const Operand& o) {
  constexpr int kPanel = panel_bytes(S) / static_cast<int>(sizeof(T)), kNeeded = 64 / static_cast<int>(sizeof(T));
  using Tile = Tile < T, 64, kNeeded<kPanel ? kPanel : kNeeded, S>;
  for (int row = 0; row < o.rows; ++row) {
    for (int k = 0; k < o.depth; ++k) {
      if (static_cast<int>(Tile::offset(row, k)) != o.offset[static_cast<size_t>(row * o.depth + k)]) return false;
    }
  }
  return true;
}

template <class T>
bool any_tile_agrees(const Operand& o) {
  if (o.swizzle == 0) return tile_agrees<T, Swizzle::kNone>(o);
  if (o.swizzle == 32) return tile_agrees<T, Swizzle::k32>(o);
  if (o.swizzle == 64) return tile_agrees<T, Swizzle::k64>(o);
  return tile_agrees<T, Swizzle::k128>(o);
}

struct DescriptorParams {
  uint64_t* bits;  // [4 swizzles][2 steps]
  int* starts;
};

template <class T, Swizzle S>
TILEWRIGHT_DEVICE void describe(const DescriptorParams& p, int at) {
  constexpr int kPanel = panel_bytes(S) / static_cast<int>(sizeof(T)), kNeeded = 64 / static_cast<int>(sizeof(T));
  using Tile = Tile < T, 64, kNeeded<kPanel ? kPanel : kNeeded, S>;
  for (int step = 0; step < 2; ++step) {
    const uint64_t bits = Tile::k_major(shared_memory(), 0, step * 32 / static_cast<int>(sizeof(T))).bits;
    const uint64_t start = bits & 0x3fff;
    p.bits[at * 2 + step] = bits - start;
    p.starts[at * 2 + step] = static_cast<int>(start * 16 - shared_address(shared_memory()));
  }
}

template <class T>
__global__ void __launch_bounds__(32, 1) describe_all(const __grid_constant__ DescriptorParams p) {
  if (threadIdx.x != 0) return;
  describe<T, Swizzle::kNone>(p, 0);
  describe<T, Swizzle::k32>(p, 1);
  describe<T, Swizzle::k64>(p, 2);
  describe<T, Swizzle::k128>(p, 3);
}

template <class T>
bool descriptor_agrees(const Operand& o) {
  Global<uint64_t> bits(8);
  Global<int> starts(8);
  launch(describe_all<T>, Grid{.threads = 32, .shared_bytes = 1024}, DescriptorParams{bits.data(), starts.data()});
  const size_t at = o.swizzle == 0 ? 0 : o.swizzle == 32 ? 2 : o.swizzle == 64 ? 4 : 6;
  for (size_t step = 0; step < 2; ++step) {
    if (bits[at + step] != o.descriptor || starts[at + step] != o.start[step]) return false;
  }
  return true;
}

void report(const std::string& name, bool holds) { std::printf("%s\t%s\t\n", name.c_str(), holds ? "right" : "wrong"); }

template <class T>
void report_k_major(const Tables& tables, const char* type) {
  const Operand* widest = nullptr;
  for (const Operand& o : tables.operands) {
    if (o.major != "K" || o.bytes != static_cast<int>(sizeof(T))) continue;
    const std::string name = std::string(type) + " K-major, swizzle " + std::to_string(o.swizzle);
    report("product, " + name, operands_agree<T, 64, Major::kK, Major::kK>(tables, o, o));
    report("tile, " + name, any_tile_agrees<T>(o));
    report("descriptor, " + name, descriptor_agrees<T>(o));
    if (o.swizzle == 128) widest = &o;
  }
  report(std::string("registers, ") + type, widest != nullptr && fragments_agree<T, 64>(tables, *widest));
}

}  // namespace

void run_layouts(const std::string& path) {
  const Tables tables = read_tables(path);
  report_k_major<bf16>(tables, "bf16");
  report_k_major<e4m3>(tables, "e4m3");
  report_k_major<int8_t>(tables, "s8");
  report_k_major<tf32>(tables, "tf32");
  for (const Operand& a : tables.operands) {
    if (a.major != "MN" || a.rows != 64) continue;
    for (const Operand& b : tables.operands) {
      if (b.bytes != 2 || b.rows != 64) continue;
      const std::string name = "product, bf16 A MN-major swizzle " + std::to_string(a.swizzle) + ", B " + b.major +
                               "-major swizzle " + std::to_string(b.swizzle);
      report(name, b.major == "MN" ? operands_agree<bf16, 64, Major::kMN, Major::kMN>(tables, a, b)
                                   : operands_agree<bf16, 64, Major::kMN, Major::kK>(tables, a, b));
    }
  }
  for (const int n : {8, 64, 96, 256}) {
    const Fragment& c = tables.fragment("wgmma" + std::to_string(n) + ".C");
    bool same = c.values == n / 2;
    for (int i = 0; i < 64 * n; ++i) {
      const int t = i / (n / 2), v = i % (n / 2);
      same = same && accumulator_row(t, v) + 64 * accumulator_col(t, v) == c.at(t, v);
    }
    report("accumulators, n " + std::to_string(n), same);
  }
  report("mma.sync bf16", warp_agrees<bf16>(tables, "bf16"));
  report("mma.sync f16", warp_agrees<f16>(tables, "f16"));
  report("mma.sync tf32", warp_agrees<tf32>(tables, "tf32"));
  report("mma.sync s8", warp_agrees<int8_t>(tables, "s8"));
  report("mma.sync e4m3", warp_agrees<e4m3>(tables, "e4m3"));
}

}  // namespace tilewright::emulator_tests
