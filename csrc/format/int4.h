// SPDX-License-Identifier: Apache-2.0
// INT4 weights: the canonical layout on disk, the interleave that the CPU kernels stream, and the only shifts between.
//
// Canonical:  codes [N][ceil(K/2)], low nibble = even k, high nibble = odd k; scales and offsets [N][G].
// CPU:        rows in blocks of 32 (the last one padded); a block is a run of chunks, one a group of columns:
//               codes    [steps][2 halves][16 rows][4 bytes]  byte b of a row: low nibble k = 8s+b, high nibble k = 8s+4+b
//               scales   [32 rows]
//               offsets  [32 rows]                             minimum or zero point; absent when symmetric
//             each chunk padded to a cache line. 64 bytes are one vector of 4-byte dot-product lanes, one lane a row, and
//             everything a block needs comes in the order of use: the whole weight is a single forward stream.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/memory.h"
#include "format/half.h"
#include "format/header.h"

namespace tilewright::format {

struct Int4 {
  static constexpr int kRowsPerBlock = 32;
  static constexpr int kRowsPerVector = 16;  // a half of a block
  static constexpr int kColsPerStep = 8;  // of one vector: 64 bytes, 16 rows
  static constexpr int kBytesPerVector = 64;
  static constexpr int kBytesPerStep = 128;
  static constexpr int kMaxCode = 15;
  static constexpr int kSymmetricZero = 8;
  static constexpr int64_t kMaxGroup = int64_t{1} << 19;  // a group's INT8 products then fit in 32 bits

  static constexpr uint8_t low(uint8_t byte) { return byte & 0x0f; }
  static constexpr uint8_t high(uint8_t byte) { return byte >> 4; }
  static constexpr uint8_t pair(uint8_t low_code, uint8_t high_code) {
    return static_cast<uint8_t>(low_code | (high_code << 4));
  }
  static constexpr uint8_t canonical(const uint8_t* row, int64_t k) {
    return (k % 2 == 0) ? low(row[k / 2]) : high(row[k / 2]);
  }
};

inline int64_t scale_bytes(ScaleType type) { return type == ScaleType::kFloat32 ? 4 : 2; }
inline int64_t offset_bytes(OffsetKind kind, ScaleType type) {
  if (kind == OffsetKind::kSymmetric) return 0;
  return kind == OffsetKind::kZeroPoint ? 1 : scale_bytes(type);
}

inline float load_scale(const void* base, int64_t index, ScaleType type) {
  if (type == ScaleType::kFloat32) return static_cast<const float*>(base)[index];
  const uint16_t bits = static_cast<const uint16_t*>(base)[index];
  return type == ScaleType::kFloat16 ? f16_to_float(bits) : bf16_to_float(bits);
}

// A packed INT4 weight, parsed and checked once; plain data from then on.
struct Int4View {
  int64_t n, k, group;
  int64_t steps;  // 8-column steps of a row, tail padded
  int64_t groups;  // G
  int64_t steps_per_group;  // of every group but the last, which may be short
  int64_t blocks;  // 32-row blocks
  int64_t chunk_bytes;  // of every group but the last
  int64_t block_bytes;
  ScaleType scale_type;
  OffsetKind offset_kind;
  float per_tensor_scale;
  const uint8_t* payload;

  int64_t padded_k() const { return steps * Int4::kColsPerStep; }
  int64_t group_steps(int64_t g) const { return g + 1 < groups ? steps_per_group : steps - g * steps_per_group; }
  // Where in the payload the codes, scales and offsets of block b and group g start ...
  int64_t codes_at(int64_t b, int64_t g) const { return b * block_bytes + g * chunk_bytes; }
  int64_t scales_at(int64_t b, int64_t g) const { return codes_at(b, g) + group_steps(g) * Int4::kBytesPerStep; }
  int64_t offsets_at(int64_t b, int64_t g) const {
    return scales_at(b, g) + Int4::kRowsPerBlock * scale_bytes(scale_type);
  }
  // ... and they themselves.
  const uint8_t* codes(int64_t b, int64_t g) const { return payload + codes_at(b, g); }
  const uint8_t* scales(int64_t b, int64_t g) const { return payload + scales_at(b, g); }
  const uint8_t* offsets(int64_t b, int64_t g) const { return payload + offsets_at(b, g); }
};

// The layout alone, for a weight that is yet to be packed: payload is null.
inline Int4View int4_layout(int64_t n, int64_t k, int64_t group, ScaleType scale_type, OffsetKind kind) {
  Int4View view{};
  view.n = n;
  view.k = k;
  view.group = group;
  view.steps = ceil_div(k, Int4::kColsPerStep);
  view.groups = ceil_div(k, group);
  view.steps_per_group = group / Int4::kColsPerStep;
  view.blocks = ceil_div(n, Int4::kRowsPerBlock);
  view.scale_type = scale_type;
  view.offset_kind = kind;
  const int64_t tail = Int4::kRowsPerBlock * (scale_bytes(scale_type) + offset_bytes(kind, scale_type));
  const auto chunk = [tail](int64_t steps) { return round_up(steps * Int4::kBytesPerStep + tail, kCacheLine); };
  view.chunk_bytes = chunk(view.steps_per_group);
  view.block_bytes = (view.groups - 1) * view.chunk_bytes + chunk(view.group_steps(view.groups - 1));
  view.per_tensor_scale = 1.0f;
  return view;
}

inline void require_group(int64_t group, const char* op) {
  require(group > 0 && group % 16 == 0 && group <= Int4::kMaxGroup, op, ": group = ", group,
          ", needed a multiple of 16 up to ", Int4::kMaxGroup);
}

inline Int4View int4_view(const void* blob, int64_t blob_bytes, const char* op) {
  const PackedHeader header = read_header(blob, blob_bytes, FormatId::kInt4, op);
  check_shape(header, op);
  require_group(header.group, op);
  require(header.scale_type <= ScaleType::kFloat32 && header.offset_kind <= OffsetKind::kZeroPoint, op,
          ": weight header states an unknown scale or offset type");
  Int4View view = int4_layout(header.rows, header.cols, header.group, header.scale_type, header.offset_kind);
  check_payload(header, view.blocks * view.block_bytes, blob_bytes, op);
  view.per_tensor_scale = header.per_tensor_scale;
  view.payload = static_cast<const uint8_t*>(blob) + sizeof(header);
  return view;
}

// Canonical tensors to the CPU interleave. scales and offsets already have the packed types.
inline void int4_pack(const Int4View& layout, const uint8_t* codes, const void* scales, const void* offsets,
                      uint8_t* payload, int64_t first_block, int64_t last_block) {
  const int64_t row_bytes = ceil_div(layout.k, 2);
  const int64_t s_bytes = scale_bytes(layout.scale_type);
  const int64_t o_bytes = offset_bytes(layout.offset_kind, layout.scale_type);
  std::memset(payload + first_block * layout.block_bytes, 0,
              static_cast<size_t>((last_block - first_block) * layout.block_bytes));
  const int64_t rows = std::min(layout.n, last_block * Int4::kRowsPerBlock);
  for (int64_t row = first_block * Int4::kRowsPerBlock; row < rows; ++row) {
    const int64_t b = row / Int4::kRowsPerBlock;
    const int64_t r = row % Int4::kRowsPerBlock;
    const uint8_t* source = codes + row * row_bytes;
    const auto code = [&](int64_t k) { return k < layout.k ? Int4::canonical(source, k) : uint8_t{0}; };
    for (int64_t g = 0; g < layout.groups; ++g) {
      uint8_t* chunk = payload + layout.codes_at(b, g);
      for (int64_t s = 0; s < layout.group_steps(g); ++s) {
        for (int byte = 0; byte < 4; ++byte) {
          const int64_t k = (g * layout.steps_per_group + s) * Int4::kColsPerStep + byte;
          chunk[s * Int4::kBytesPerStep + r * 4 + byte] = Int4::pair(code(k), code(k + 4));
        }
      }
      const auto put = [&](int64_t region, const void* base, int64_t bytes) {
        std::memcpy(payload + region + r * bytes, static_cast<const uint8_t*>(base) + (row * layout.groups + g) * bytes,
                    static_cast<size_t>(bytes));
      };
      put(layout.scales_at(b, g), scales, s_bytes);
      if (o_bytes != 0) put(layout.offsets_at(b, g), offsets, o_bytes);
    }
  }
}

// Element (row, k) in the CPU interleave, one at a time: for oracles, the generic level and single rows.
inline uint8_t int4_code(const Int4View& view, int64_t row, int64_t k) {
  const int64_t g = k / view.group;
  const int64_t step = k / Int4::kColsPerStep - g * view.steps_per_group;
  const int64_t within = k % Int4::kColsPerStep;
  const uint8_t* chunk = view.codes(row / Int4::kRowsPerBlock, g);
  const uint8_t byte = chunk[step * Int4::kBytesPerStep + row % Int4::kRowsPerBlock * 4 + within % 4];
  return within < 4 ? Int4::low(byte) : Int4::high(byte);
}

// What the codes of a row's group mean: (code - zero) * scale + minimum.
struct Int4Lane {
  float scale;
  float minimum;  // 0 unless kMinimum
  int zero;  // 0 if kMinimum
};

inline Int4Lane int4_lane(const Int4View& view, int64_t row, int64_t g) {
  const int64_t b = row / Int4::kRowsPerBlock;
  const int64_t r = row % Int4::kRowsPerBlock;
  const float scale = load_scale(view.scales(b, g), r, view.scale_type);
  switch (view.offset_kind) {
    case OffsetKind::kMinimum: return {scale, load_scale(view.offsets(b, g), r, view.scale_type), 0};
    case OffsetKind::kZeroPoint: return {scale, 0.0f, view.offsets(b, g)[r]};
    case OffsetKind::kSymmetric: break;
  }
  return {scale, 0.0f, Int4::kSymmetricZero};
}

}  // namespace tilewright::format
