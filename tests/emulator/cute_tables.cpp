// SPDX-License-Identifier: Apache-2.0
// What CuTe's layout algebra says of Hopper's matrix instructions, as text: an oracle that is not ours.
//   fragment NAME threads values: index of each (thread, value), columns of M (or N) rows
//   operand BYTES MAJOR SWIZZLE ROWS DEPTH: descriptor bits, start of each step in bytes, byte offset of each (row, k)
#include <cstdio>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm89.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;

namespace {

template <class Layout>
void fragment(const char* name, const Layout& layout) {
  constexpr int kThreads = size<0>(Layout{}), kValues = size<1>(Layout{});
  std::printf("fragment %s %d %d", name, kThreads, kValues);
  for (int t = 0; t < kThreads; ++t) {
    for (int v = 0; v < kValues; ++v) std::printf(" %d", static_cast<int>(layout(t, v)));
  }
  std::printf("\n");
}

template <class Op>
void warp_fragments(const char* name) {
  using Traits = MMA_Traits<Op>;
  char text[64];
  const auto of = [&](const char* which) {
    std::snprintf(text, sizeof(text), "%s.%s", name, which);
    return text;
  };
  fragment(of("A"), typename Traits::ALayout{});
  fragment(of("B"), typename Traits::BLayout{});
  fragment(of("C"), typename Traits::CLayout{});
}

// An operand of kRows by two instructions' depths.
template <class T, SM90::GMMA::Major kMajor, int kSwizzle, int kRows, class Atom>
void operand(Atom) {
  constexpr int kBytes = sizeof(T), kDepth = 32 / kBytes;
  const auto layout =
      tile_to_shape(Atom{}, Shape < Int<kRows>, Int<2 * kDepth<size<1>(Atom{}) ? size<1>(Atom{}) : 2 * kDepth>>{});
  alignas(1024) static char memory[65536];
  const auto tensor = make_tensor(make_smem_ptr(reinterpret_cast<T*>(memory)), layout);
  const auto first = local_tile(tensor, Shape<Int<kRows>, Int<kDepth>>{}, make_coord(0, 0));
  GmmaDescriptor descriptor = SM90::GMMA::make_gmma_desc<kMajor>(first);
  descriptor.bitfield.start_address_ = 0;
  std::printf("operand %d %s %d %d %d %llu", kBytes, kMajor == SM90::GMMA::Major::K ? "K" : "MN", kSwizzle, kRows,
              2 * kDepth, static_cast<unsigned long long>(descriptor.desc_));
  for (int step = 0; step < 2; ++step) {
    std::printf(" %d", static_cast<int>(layout.layout_b()(0, step * kDepth)) * kBytes);
  }
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < 2 * kDepth; ++k) {
      // The swizzle is one of addresses.
      std::printf(" %d", static_cast<int>(reinterpret_cast<char*>(&tensor(row, k)) - memory));
    }
  }
  std::printf("\n");
}

template <class T>
void k_major() {
  using namespace SM90::GMMA;
  operand<T, Major::K, 0, 64>(Layout_K_INTER_Atom<T>{});
  operand<T, Major::K, 32, 64>(Layout_K_SW32_Atom<T>{});
  operand<T, Major::K, 64, 64>(Layout_K_SW64_Atom<T>{});
  operand<T, Major::K, 128, 64>(Layout_K_SW128_Atom<T>{});
}

template <class T>
void mn_major() {
  using namespace SM90::GMMA;
  operand<T, Major::MN, 0, 64>(Layout_MN_INTER_Atom<T>{});
  operand<T, Major::MN, 32, 64>(Layout_MN_SW32_Atom<T>{});
  operand<T, Major::MN, 64, 64>(Layout_MN_SW64_Atom<T>{});
  operand<T, Major::MN, 128, 64>(Layout_MN_SW128_Atom<T>{});
}

}  // namespace

int main() {
  using namespace SM90::GMMA;
  fragment("wgmma4.A", ALayout_64x8{});
  fragment("wgmma2.A", ALayout_64x16{});
  fragment("wgmma1.A", ALayout_64x32{});
  fragment("wgmma8.C", CLayout_64x8{});
  fragment("wgmma64.C", CLayout_64x64{});
  fragment("wgmma96.C", CLayout_64x96{});
  fragment("wgmma256.C", CLayout_64x256{});
  warp_fragments<SM80_16x8x16_F32BF16BF16F32_TN>("bf16");
  warp_fragments<SM80_16x8x16_F32F16F16F32_TN>("f16");
  warp_fragments<SM80_16x8x8_F32TF32TF32F32_TN>("tf32");
  warp_fragments<SM80_16x8x32_S32S8S8S32_TN>("s8");
  warp_fragments<SM89_16x8x32_F32E4M3E4M3F32_TN>("e4m3");
  k_major<bfloat16_t>();
  k_major<int8_t>();
  k_major<tfloat32_t>();
  mn_major<bfloat16_t>();
  return 0;
}
