// SPDX-License-Identifier: Apache-2.0
// INT8 weights with a float16 scale for each group of 32 columns (the values of GGUF's Q8_0), and the interleave that the
// CPU kernels stream.
//
// Canonical:  codes int8 [N][K], scales float16 [N][G], G = ceil(K / 32); value = code * scale.
// CPU:        rows in blocks of 32 (the last one padded); a block is a run of chunks, one a group of columns:
//               codes    [8 steps][2 halves][16 rows][4 bytes]  code + 128: the unsigned operand of the dot product
//               scales   [32 rows] float16
//             Padding holds code 0 (byte 128) and scale 0. Everything a block needs comes in the order of use: the whole
//             weight is a single forward stream.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/memory.h"
#include "format/half.h"
#include "format/header.h"

namespace tilewright::format {

struct Int8 {
  static constexpr int kRowsPerBlock = 32;
  static constexpr int kRowsPerVector = 16;  // a half of a block
  static constexpr int kGroup = 32;
  static constexpr int kColsPerStep = 4;  // of one vector: 64 bytes, 16 rows
  static constexpr int kBytesPerVector = 64;
  static constexpr int kBytesPerStep = 128;
  static constexpr int kStepsPerGroup = kGroup / kColsPerStep;
  static constexpr int kScalesAt = kStepsPerGroup * kBytesPerStep;  // in a chunk
  static constexpr int kChunkBytes = kScalesAt + kRowsPerBlock * 2;
  static constexpr int kZero = 128;  // stored byte of code 0

  // Where the code of a block's row and a group's column lies in the chunk.
  static constexpr int64_t code_at(int64_t row, int64_t column) {
    return column / kColsPerStep * kBytesPerStep + row * kColsPerStep + column % kColsPerStep;
  }
};

// A packed INT8 weight, parsed and checked once; plain data from then on.
struct Int8View {
  int64_t n, k;
  int64_t groups;
  int64_t blocks;
  int64_t block_bytes;
  const uint8_t* payload;

  const uint8_t* block(int64_t b) const { return payload + b * block_bytes; }
  const uint8_t* chunk(int64_t b, int64_t g) const { return block(b) + g * Int8::kChunkBytes; }
  int64_t padded_k() const { return groups * Int8::kGroup; }
};

inline Int8View int8_layout(int64_t n, int64_t k) {
  Int8View view{};
  view.n = n;
  view.k = k;
  view.groups = ceil_div(k, Int8::kGroup);
  view.blocks = ceil_div(n, Int8::kRowsPerBlock);
  view.block_bytes = view.groups * Int8::kChunkBytes;
  return view;
}

inline Int8View int8_view(const void* blob, int64_t blob_bytes, const char* op) {
  const PackedHeader header = read_header(blob, blob_bytes, FormatId::kInt8, op);
  check_shape(header, op);
  require(header.group == Int8::kGroup && header.scale_type == ScaleType::kFloat16, op, ": weight header states group ",
          header.group, ", an INT8 weight has groups of 32 with float16 scales");
  Int8View view = int8_layout(header.rows, header.cols);
  check_payload(header, view.blocks * view.block_bytes, blob_bytes, op);
  view.payload = static_cast<const uint8_t*>(blob) + sizeof(header);
  return view;
}

// Canonical tensors to blocks [first, last) of the CPU interleave.
inline void int8_pack(const Int8View& layout, const int8_t* codes, const uint16_t* scales, uint8_t* payload,
                      int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t rows = std::min<int64_t>(Int8::kRowsPerBlock, layout.n - b * Int8::kRowsPerBlock);
    for (int64_t g = 0; g < layout.groups; ++g) {
      uint8_t* chunk = payload + b * layout.block_bytes + g * Int8::kChunkBytes;
      std::memset(chunk, Int8::kZero, Int8::kScalesAt);
      std::memset(chunk + Int8::kScalesAt, 0, Int8::kChunkBytes - Int8::kScalesAt);
      const int64_t columns = std::min<int64_t>(Int8::kGroup, layout.k - g * Int8::kGroup);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = b * Int8::kRowsPerBlock + r;
        const int8_t* source = codes + row * layout.k + g * Int8::kGroup;
        for (int64_t c = 0; c < columns; ++c) {
          chunk[Int8::code_at(r, c)] = static_cast<uint8_t>(source[c] + Int8::kZero);
        }
        std::memcpy(chunk + Int8::kScalesAt + r * 2, scales + row * layout.groups + g, 2);
      }
    }
  }
}

inline int int8_code(const Int8View& view, int64_t row, int64_t k) {
  const uint8_t* chunk = view.chunk(row / Int8::kRowsPerBlock, k / Int8::kGroup);
  return chunk[Int8::code_at(row % Int8::kRowsPerBlock, k % Int8::kGroup)] - Int8::kZero;
}

inline float int8_scale(const Int8View& view, int64_t row, int64_t group) {
  const uint8_t* chunk = view.chunk(row / Int8::kRowsPerBlock, group);
  uint16_t bits = 0;
  std::memcpy(&bits, chunk + Int8::kScalesAt + row % Int8::kRowsPerBlock * 2, sizeof(bits));
  return f16_to_float(bits);
}

// out[K]: one dequantized row.
inline void int8_row(const Int8View& view, int64_t row, float* out) {
  for (int64_t g = 0; g < view.groups; ++g) {
    const float scale = int8_scale(view, row, g);
    const int64_t last = std::min(view.k, (g + 1) * Int8::kGroup);
    for (int64_t k = g * Int8::kGroup; k < last; ++k) out[k] = static_cast<float>(int8_code(view, row, k)) * scale;
  }
}

}  // namespace tilewright::format
