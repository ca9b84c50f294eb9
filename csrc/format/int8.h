// SPDX-License-Identifier: Apache-2.0
// INT8 weights with a float16 scale for each group of 32 columns (the values of GGUF's Q8_0), and the interleave that the
// CPU kernels stream.
//
// Canonical:  codes int8 [N][K], scales float16 [N][G], G = ceil(K / 32); value = code * scale.
// CPU:        rows in blocks of 16 (the last one padded), each block two regions that start on a cache line:
//               codes    [Kp/4][16 rows][4 bytes]  code + 128, unsigned: the unsigned operand of the dot product
//               scales   [G][16 rows] float16
//             Kp = K rounded up to 32; padding holds code 0 (byte 128) and scale 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/memory.h"
#include "format/half.h"
#include "format/header.h"

namespace tilewright::format {

struct Int8 {
  static constexpr int kRowsPerBlock = 16;
  static constexpr int kGroup = 32;
  static constexpr int kColsPerStep = 4;  // one 64-byte vector: 16 rows x 4 columns
  static constexpr int kBytesPerStep = 64;
  static constexpr int kStepsPerGroup = kGroup / kColsPerStep;
  static constexpr int kZero = 128;  // stored byte of code 0
};

// A packed INT8 weight, parsed and checked once; plain data from then on.
struct Int8View {
  int64_t n, k;
  int64_t groups;
  int64_t blocks;
  int64_t scales_at, block_bytes;
  const uint8_t* payload;

  const uint8_t* block(int64_t b) const { return payload + b * block_bytes; }
  const uint16_t* scales(int64_t b) const { return reinterpret_cast<const uint16_t*>(block(b) + scales_at); }
  int64_t padded_k() const { return groups * Int8::kGroup; }
};

inline Int8View int8_layout(int64_t n, int64_t k) {
  Int8View view{};
  view.n = n;
  view.k = k;
  view.groups = ceil_div(k, Int8::kGroup);
  view.blocks = ceil_div(n, Int8::kRowsPerBlock);
  view.scales_at = view.groups * Int8::kStepsPerGroup * Int8::kBytesPerStep;
  view.block_bytes = view.scales_at + round_up(view.groups * Int8::kRowsPerBlock * 2, kCacheLine);
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
    uint8_t* block = payload + b * layout.block_bytes;
    std::memset(block, Int8::kZero, static_cast<size_t>(layout.scales_at));
    std::memset(block + layout.scales_at, 0, static_cast<size_t>(layout.block_bytes - layout.scales_at));
    auto* block_scales = reinterpret_cast<uint16_t*>(block + layout.scales_at);
    for (int64_t r = 0; r < Int8::kRowsPerBlock; ++r) {
      const int64_t row = b * Int8::kRowsPerBlock + r;
      if (row >= layout.n) break;
      for (int64_t k = 0; k < layout.k; ++k) {
        block[((k / 4) * Int8::kRowsPerBlock + r) * 4 + k % 4] =
            static_cast<uint8_t>(codes[row * layout.k + k] + Int8::kZero);
      }
      for (int64_t g = 0; g < layout.groups; ++g) {
        block_scales[g * Int8::kRowsPerBlock + r] = scales[row * layout.groups + g];
      }
    }
  }
}

inline int int8_code(const Int8View& view, int64_t row, int64_t k) {
  const uint8_t* block = view.block(row / Int8::kRowsPerBlock);
  return block[((k / 4) * Int8::kRowsPerBlock + row % Int8::kRowsPerBlock) * 4 + k % 4] - Int8::kZero;
}

inline float int8_scale(const Int8View& view, int64_t row, int64_t group) {
  return f16_to_float(view.scales(row / Int8::kRowsPerBlock)[group * Int8::kRowsPerBlock + row % Int8::kRowsPerBlock]);
}

}  // namespace tilewright::format
