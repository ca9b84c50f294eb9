// SPDX-License-Identifier: Apache-2.0
// Matrix products on rows of 32 bytes of K, whatever the elements: shared by wgmma and mma.sync. Internal to the emulator.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "emulator/runtime.h"

namespace tilewright::emulator {

inline constexpr int kRowBytes = 32;  // of K, in every instruction
inline constexpr int kMaxDepth = 32;

int element_bytes(Element element);
bool is_integer(Element element);
// Rows [rows][32 bytes] of elements as floats or integers, [depth][rows].
void decode_floats(Element element, const uint8_t* bytes, int rows, float* transposed);
void decode_integers(Element element, const uint8_t* bytes, int rows, int32_t* transposed);
// d[m][n] += sum over k of a[k][m] b[k][n], k ascending.
void multiply(int m, int n, int depth, const float* a, const float* b, float* d);
void multiply(int m, int n, int depth, const int32_t* a, const int32_t* b, int32_t* d);

// A wgmma of a warpgroup from its issue until the last thread has its registers back.
struct Product {
  ProductShape shape;
  uint64_t a, b;
  bool a_in_registers, accumulate;
  Product* earlier = nullptr;  // the product under way whose accumulators this one goes on with
  int issued = 0, returned = 0;  // threads
  std::array<int, 4> issued_by_warp{};
  bool reading = false, executed = false;
  std::vector<uint32_t> d;  // [128][n / 2]
  std::array<std::array<uint32_t, 4>, 128> a_registers;
  std::vector<uint32_t> a_chunks, b_chunks;  // shared offsets of the operands' 16-byte pieces
};

}  // namespace tilewright::emulator
