// SPDX-License-Identifier: Apache-2.0
// The host half of hopper/wgmma.h; included inside its namespace.

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int Pending>
void wgmma_wait() {
  emulator::wgmma_wait(Pending);
}

// Registers of a product in flight are memory here that the compiler knows to be shared: there is nothing to keep.
template <class T, int Count>
void keep(T (&)[Count]) {}

namespace detail {

template <class T>
constexpr emulator::Element element_of() {
  if constexpr (std::is_same_v<T, bf16>) return emulator::Element::kBf16;
  if constexpr (std::is_same_v<T, f16>) return emulator::Element::kF16;
  if constexpr (std::is_same_v<T, e4m3>) return emulator::Element::kE4m3;
  if constexpr (std::is_same_v<T, tf32>) return emulator::Element::kTf32;
  if constexpr (std::is_same_v<T, int8_t>) return emulator::Element::kS8;
  return emulator::Element::kU8;
}

template <class A, class B, int N>
struct WgmmaInstruction {
  static constexpr bool kSame = std::is_same_v<A, B> && !std::is_same_v<A, uint8_t>;
  static constexpr bool kMixedBytes = (std::is_same_v<A, uint8_t> && std::is_same_v<B, int8_t>) ||
                                      (std::is_same_v<A, int8_t> && std::is_same_v<B, uint8_t>);
  static_assert(kSame || kMixedBytes, "there is no such wgmma");
  static_assert(N == 8 || N == 16 || N == 24 || N == 32 || N == 48 || N == 64 || N == 96 || N == 128 || N == 160 ||
                    N == 192 || N == 256,
                "hopper/wgmma.h has no instruction of this width");
  using D = typename WgmmaResult<A>::Type;

  template <int TA, int TB>
  static void run(D (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    emulator::wgmma_issue({element_of<A>(), element_of<B>(), N, TA != 0, TB != 0}, d, nullptr, a, b, accumulate != 0);
  }
  template <int TB>
  static void run(D (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    emulator::wgmma_issue({element_of<A>(), element_of<B>(), N, false, TB != 0}, d, a, 0, b, accumulate != 0);
  }
};

}  // namespace detail
