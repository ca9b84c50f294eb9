// SPDX-License-Identifier: Apache-2.0
#include "emulator/products.h"

#include <bit>
#include <cstring>

#include "emulator/numbers.h"

namespace tilewright::emulator {

int element_bytes(Element element) {
  switch (element) {
    case Element::kBf16:
    case Element::kF16: return 2;
    case Element::kTf32: return 4;
    default: return 1;
  }
}

bool is_integer(Element element) { return element == Element::kS8 || element == Element::kU8; }

void decode_floats(Element element, const uint8_t* bytes, int rows, float* transposed) {
  const int size = element_bytes(element), depth = kRowBytes / size;
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < depth; ++k) {
      uint32_t bits = 0;
      std::memcpy(&bits, bytes + r * kRowBytes + k * size, static_cast<size_t>(size));
      float value = 0.0f;
      switch (element) {
        case Element::kBf16: value = std::bit_cast<float>(bits << 16); break;
        case Element::kF16: value = f16_to_float(static_cast<uint16_t>(bits)); break;
        case Element::kE4m3: value = e4m3_to_float(static_cast<uint8_t>(bits)); break;
        default: value = std::bit_cast<float>(bits & 0xffffe000u); break;  // tf32: the low 13 bits are not read
      }
      transposed[k * rows + r] = value;
    }
  }
}

void decode_integers(Element element, const uint8_t* bytes, int rows, int32_t* transposed) {
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < kRowBytes; ++k) {
      const uint8_t byte = bytes[r * kRowBytes + k];
      transposed[k * rows + r] = element == Element::kS8 ? static_cast<int8_t>(byte) : byte;
    }
  }
}

namespace {

template <class T>
void multiply_as(int m, int n, int depth, const T* a, const T* b, T* d) {
  for (int i = 0; i < m; ++i) {
    T* row = d + i * n;
    for (int k = 0; k < depth; ++k) {
      const T scale = a[k * m + i];
      const T* from = b + k * n;
      for (int j = 0; j < n; ++j) row[j] += scale * from[j];
    }
  }
}

}  // namespace

void multiply(int m, int n, int depth, const float* a, const float* b, float* d) { multiply_as(m, n, depth, a, b, d); }
void multiply(int m, int n, int depth, const int32_t* a, const int32_t* b, int32_t* d) {
  multiply_as(m, n, depth, a, b, d);
}

}  // namespace tilewright::emulator
