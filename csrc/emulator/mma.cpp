// SPDX-License-Identifier: Apache-2.0
// mma.sync, ldmatrix and stmatrix.
#include <cstring>

#include "emulator/products.h"
#include "emulator/state.h"

namespace tilewright::emulator {
namespace {

struct MmaLane {
  Element a_element, b_element;
  void* d;
  const uint32_t *a, *b;
};

// Lane l holds of A, word j: row l / 4 + 8 (j % 2), bytes 4 (l % 4) of half j / 2; of B, word j: column l / 4, half j.
template <class T>
void run_mma(void* const* lanes) {
  uint8_t a[16 * kRowBytes], b[8 * kRowBytes];
  T left[16 * kMaxDepth], right[8 * kMaxDepth], d[16 * 8];
  const auto& first = *static_cast<const MmaLane*>(lanes[0]);
  for (int l = 0; l < 32; ++l) {
    const auto& lane = *static_cast<const MmaLane*>(lanes[l]);
    for (int j = 0; j < 4; ++j) {
      std::memcpy(a + (l / 4 + 8 * (j % 2)) * kRowBytes + 16 * (j / 2) + 4 * (l % 4), lane.a + j, 4);
      std::memcpy(d + (l / 4 + 8 * (j / 2)) * 8 + 2 * (l % 4) + j % 2, static_cast<const uint32_t*>(lane.d) + j, 4);
    }
    for (int j = 0; j < 2; ++j) std::memcpy(b + l / 4 * kRowBytes + 16 * j + 4 * (l % 4), lane.b + j, 4);
  }
  if constexpr (std::is_same_v<T, float>) {
    decode_floats(first.a_element, a, 16, left);
    decode_floats(first.b_element, b, 8, right);
  } else {
    decode_integers(first.a_element, a, 16, left);
    decode_integers(first.b_element, b, 8, right);
  }
  multiply(16, 8, kRowBytes / element_bytes(first.a_element), left, right, d);
  for (int l = 0; l < 32; ++l) {
    auto* out = static_cast<uint32_t*>(static_cast<const MmaLane*>(lanes[l])->d);
    for (int j = 0; j < 4; ++j) std::memcpy(out + j, d + (l / 4 + 8 * (j / 2)) * 8 + 2 * (l % 4) + j % 2, 4);
  }
}

const char* mma_name(Element a, Element b) {
  switch (a) {
    case Element::kBf16: return "mma_m16n8k16 (bf16)";
    case Element::kF16: return "mma_m16n8k16 (f16)";
    case Element::kTf32: return "mma_m16n8k8_tf32";
    case Element::kE4m3: return "mma_m16n8k32_e4m3";
    case Element::kS8: return b == Element::kS8 ? "mma_m16n8k32_s8s8" : "mma_m16n8k32_s8u8";
    case Element::kU8: return "mma_m16n8k32_u8s8";
  }
  return "mma";
}

struct MatrixLane {
  char* row;
  uint32_t* registers;
};

// Where in the 8x8 matrix the halves of a lane's register are.
void move_element(char* const* rows, int lane, int half, bool transposed, uint16_t& value, bool store) {
  const int r = transposed ? 2 * (lane % 4) + half : lane / 4;
  const int c = transposed ? lane / 4 : 2 * (lane % 4) + half;
  char* at = rows[r] + 2 * c;
  if (store) {
    std::memcpy(at, &value, 2);
  } else {
    std::memcpy(&value, at, 2);
  }
}

template <int kCount, bool kTransposed, bool kStore>
void move_matrices(void* const* lanes, uint32_t) {
  for (int matrix = 0; matrix < kCount; ++matrix) {
    char* rows[8];
    for (int r = 0; r < 8; ++r) rows[r] = static_cast<MatrixLane*>(lanes[matrix * 8 + r])->row;
    for (int l = 0; l < 32; ++l) {
      uint32_t& word = static_cast<MatrixLane*>(lanes[l])->registers[matrix];
      uint16_t halves[2];
      std::memcpy(halves, &word, 4);
      for (int half = 0; half < 2; ++half) move_element(rows, l, half, kTransposed, halves[half], kStore);
      if (!kStore) std::memcpy(&word, halves, 4);
    }
  }
}

void check_row(const void* row, int count, const char* name) {
  if (current->lane() >= 8 * count) return;  // only the first 8 * count lanes give addresses
  if (shared_offset(this_block(), row, 16, name) % 16 != 0) {
    kernel_error("%s: the row at %p is no multiple of 16 bytes", name, row);
  }
}

}  // namespace

void mma(Element a, Element b, void* d, const uint32_t* a_registers, const uint32_t* b_registers) {
  const Unwatched inside;
  MmaLane lane{a, b, d, a_registers, b_registers};
  const bool integers = is_integer(a);
  meet_warp(
      mma_name(a, b), 0xffffffffu, &lane,
      integers ? [](void* const* lanes, uint32_t) { run_mma<int32_t>(lanes); }
               : [](void* const* lanes, uint32_t) { run_mma<float>(lanes); });
  registers_written(d, 16);
}

void load_matrices(uint32_t* registers, const void* row, int count, bool transposed) {
  const Unwatched inside;
  const char* name = count == 4 ? (transposed ? "ldmatrix_x4_transposed" : "ldmatrix_x4")
                                : (transposed ? "ldmatrix_x2_transposed" : "ldmatrix_x2");
  check_row(row, count, name);
  if (current->lane() < 8 * count) check_read(row, 16, name);
  MatrixLane lane{const_cast<char*>(static_cast<const char*>(row)), registers};
  const Finish finish = count == 4 ? (transposed ? &move_matrices<4, true, false> : &move_matrices<4, false, false>)
                                   : (transposed ? &move_matrices<2, true, false> : &move_matrices<2, false, false>);
  meet_warp(name, 0xffffffffu, &lane, finish);
  registers_written(registers, static_cast<size_t>(count) * 4);
}

void store_matrices(void* row, const uint32_t* registers, int count, bool transposed) {
  const Unwatched inside;
  const char* name = count == 4 ? (transposed ? "stmatrix_x4_transposed" : "stmatrix_x4")
                                : (transposed ? "stmatrix_x2_transposed" : "stmatrix_x2");
  check_row(row, count, name);
  if (current->lane() < 8 * count) check_write(row, 16, name);
  MatrixLane lane{static_cast<char*>(row), const_cast<uint32_t*>(registers)};
  const Finish finish = count == 4 ? (transposed ? &move_matrices<4, true, true> : &move_matrices<4, false, true>)
                                   : (transposed ? &move_matrices<2, true, true> : &move_matrices<2, false, true>);
  meet_warp(name, 0xffffffffu, &lane, finish);
}

}  // namespace tilewright::emulator
