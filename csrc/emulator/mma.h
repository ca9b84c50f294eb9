// SPDX-License-Identifier: Apache-2.0
// The host half of hopper/mma.h; included inside its namespace.

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16 /*type*/) {
  emulator::mma(emulator::Element::kBf16, emulator::Element::kBf16, d, a, b);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16 /*type*/) {
  emulator::mma(emulator::Element::kF16, emulator::Element::kF16, d, a, b);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Element::kTf32, emulator::Element::kTf32, d, a, b);
}
inline void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Element::kE4m3, emulator::Element::kE4m3, d, a, b);
}
inline void mma_m16n8k32_s8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Element::kS8, emulator::Element::kS8, d, a, b);
}
inline void mma_m16n8k32_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Element::kU8, emulator::Element::kS8, d, a, b);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, 4, false); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, 4, true); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emulator::load_matrices(r, row, 2, false); }
inline void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row) { emulator::load_matrices(r, row, 2, true); }
inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) { emulator::store_matrices(row, r, 4, false); }
inline void stmatrix_x4_transposed(void* row, const uint32_t (&r)[4]) { emulator::store_matrices(row, r, 4, true); }
inline void stmatrix_x2(void* row, const uint32_t (&r)[2]) { emulator::store_matrices(row, r, 2, false); }
inline void stmatrix_x2_transposed(void* row, const uint32_t (&r)[2]) { emulator::store_matrices(row, r, 2, true); }
