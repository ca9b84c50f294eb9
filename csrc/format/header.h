// SPDX-License-Identifier: Apache-2.0
// The 64 bytes in front of every packed tensor. A kernel reads them first and refuses what it was not made for.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/require.h"

namespace tilewright::format {

enum class FormatId : uint16_t { kInt4 = 1, kTernary = 2, kInt8 = 3, kBFloat16 = 4, kInt4Hopper = 5 };
enum class ScaleType : uint8_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// What the stored code u stands for:
//   kSymmetric  (u - 8) * scale
//   kMinimum    u * scale + minimum     minimum has the type of the scale
//   kZeroPoint  (u - zero) * scale      zero is a byte
enum class OffsetKind : uint8_t { kSymmetric = 0, kMinimum = 1, kZeroPoint = 2 };

struct PackedHeader {
  static constexpr char kMagic[8] = {'T', 'I', 'L', 'E', 'W', 'R', 'T', '\0'};
  static constexpr uint16_t kVersion = 1;

  char magic[8];
  uint16_t version;
  FormatId format;
  ScaleType scale_type;
  OffsetKind offset_kind;
  uint16_t variant;  // of formats that have several: kInt4Hopper, 1 if codes are signed; kTernary, the packing
  int64_t rows;  // N
  int64_t cols;  // K
  int64_t group;  // elements of K that share a scale
  int64_t payload_bytes;  // after this header
  float per_tensor_scale;  // p: the codes represent p * weight
  uint8_t padding[12];
};
static_assert(sizeof(PackedHeader) == 64);

inline PackedHeader read_header(const void* blob, int64_t blob_bytes, FormatId wanted, const char* op) {
  require(blob_bytes >= static_cast<int64_t>(sizeof(PackedHeader)), op, ": weight has ", blob_bytes,
          " bytes, fewer than the 64 of a packed header; pack it with Int4Weight.pack()");
  PackedHeader header;
  std::memcpy(&header, blob, sizeof(header));
  require(std::memcmp(header.magic, PackedHeader::kMagic, sizeof(header.magic)) == 0, op,
          ": weight does not start with the packed-tensor magic; pack it with Int4Weight.pack()");
  require(header.version == PackedHeader::kVersion, op, ": weight has packed version ", header.version,
          ", this build reads version ", PackedHeader::kVersion, "; pack it again from the canonical tensors");
  require(header.format == wanted, op, ": weight holds packed format ", static_cast<int>(header.format), ", needed ",
          static_cast<int>(wanted));
  return header;
}

inline constexpr int64_t kMaxDim = int64_t{1} << 31;

inline void check_shape(const PackedHeader& header, const char* op) {
  require(header.rows >= 0 && header.rows < kMaxDim && header.cols > 0 && header.cols < kMaxDim, op,
          ": weight header states shape [", header.rows, ", ", header.cols, "], outside what can be packed");
}

inline void check_payload(const PackedHeader& header, int64_t payload_bytes, int64_t blob_bytes, const char* op) {
  const int64_t needed = static_cast<int64_t>(sizeof(PackedHeader)) + payload_bytes;
  require(header.payload_bytes == payload_bytes && blob_bytes >= needed, op, ": weight holds ", blob_bytes,
          " bytes, its header's shape needs ", needed);
}

}  // namespace tilewright::format
