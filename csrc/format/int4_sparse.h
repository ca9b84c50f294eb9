// SPDX-License-Identifier: Apache-2.0
// INT4 weights for products that read some rows, or some columns, of a matrix and nothing of the others. The values are
// those of Int4; tilewright/formats/int4_sparse.py packs both.
//
// Rows (kInt4Rows):      one run of bytes a row: codes [K/32][16 bytes], byte b of 32 columns: low nibble column b, high
//                        nibble column 16 + b; scales [G]; offsets [G]; padded to a cache line.
// Columns (kInt4Columns): the matrix [N, K] transposed, a block for each group of inputs k:
//                          scales  [Np], padded to a cache line
//                          offsets [Np], likewise; absent when symmetric
//                          codes   [group][Np/64][32 bytes], byte b of 64 outputs: low nibble output b, high nibble
//                                  output 32 + b; each input's run padded to a cache line
//                        Np = N rounded up to 64, padding zero; the last block is whole.
#pragma once

#include "format/int4.h"

namespace tilewright::format {

// Numbers of the header's format, beside those of FormatId.
inline constexpr FormatId kInt4Rows{6}, kInt4Columns{7};

struct Int4Sparse {
  static constexpr int64_t kRowColumns = 32;  // columns that 16 bytes of a row hold
  static constexpr int64_t kOutputs = 64;  // outputs that 32 bytes of an input's run hold
};

struct Int4RowsView {
  int64_t n, k, group, groups;
  int64_t scales_at, offsets_at, row_bytes;  // within a row
  ScaleType scale_type;
  OffsetKind offset_kind;
  float per_tensor_scale;
  const uint8_t* payload;

  const uint8_t* row(int64_t r) const { return payload + r * row_bytes; }
};

struct Int4ColumnsView {
  int64_t n, k, group, groups, padded_n;
  int64_t offsets_at, codes_at, run_bytes, block_bytes;  // within a block; of an input; of a block
  ScaleType scale_type;
  OffsetKind offset_kind;
  float per_tensor_scale;
  const uint8_t* payload;

  const uint8_t* block(int64_t g) const { return payload + g * block_bytes; }
  const uint8_t* run(int64_t input) const { return block(input / group) + codes_at + input % group * run_bytes; }
};

inline void check_sparse(const PackedHeader& header, const char* op) {
  check_shape(header, op);
  require_group(header.group, op);
  require(header.scale_type <= ScaleType::kFloat32 && header.offset_kind <= OffsetKind::kZeroPoint, op,
          ": weight header states an unknown scale or offset type");
}

inline Int4RowsView int4_rows_view(const void* blob, int64_t blob_bytes, const char* op) {
  const PackedHeader header = read_header(blob, blob_bytes, kInt4Rows, op);
  check_sparse(header, op);
  require(header.cols % Int4Sparse::kRowColumns == 0 && header.group % Int4Sparse::kRowColumns == 0, op,
          ": weight header states K = ", header.cols, " and group ", header.group, ", needed multiples of 32");
  Int4RowsView v{};
  v.n = header.rows;
  v.k = header.cols;
  v.group = header.group;
  v.groups = ceil_div(v.k, v.group);
  v.scale_type = header.scale_type;
  v.offset_kind = header.offset_kind;
  v.per_tensor_scale = header.per_tensor_scale;
  v.scales_at = v.k / 2;
  v.offsets_at = v.scales_at + v.groups * scale_bytes(v.scale_type);
  v.row_bytes = round_up(v.offsets_at + v.groups * offset_bytes(v.offset_kind, v.scale_type), kCacheLine);
  check_payload(header, v.n * v.row_bytes, blob_bytes, op);
  v.payload = static_cast<const uint8_t*>(blob) + sizeof(header);
  return v;
}

inline Int4ColumnsView int4_columns_view(const void* blob, int64_t blob_bytes, const char* op) {
  const PackedHeader header = read_header(blob, blob_bytes, kInt4Columns, op);
  check_sparse(header, op);
  Int4ColumnsView v{};
  v.n = header.rows;
  v.k = header.cols;
  v.group = header.group;
  v.groups = ceil_div(v.k, v.group);
  v.padded_n = round_up(v.n, Int4Sparse::kOutputs);
  v.scale_type = header.scale_type;
  v.offset_kind = header.offset_kind;
  v.per_tensor_scale = header.per_tensor_scale;
  v.offsets_at = round_up(v.padded_n * scale_bytes(v.scale_type), kCacheLine);
  v.codes_at = v.offsets_at + round_up(v.padded_n * offset_bytes(v.offset_kind, v.scale_type), kCacheLine);
  v.run_bytes = round_up(v.padded_n / 2, kCacheLine);
  v.block_bytes = v.codes_at + v.group * v.run_bytes;
  check_payload(header, v.groups * v.block_bytes, blob_bytes, op);
  v.payload = static_cast<const uint8_t*>(blob) + sizeof(header);
  return v;
}

// Code of input k and output n, one at a time.
inline uint8_t int4_columns_code(const Int4ColumnsView& v, int64_t n, int64_t k) {
  const uint8_t byte = v.run(k)[n / 64 * 32 + n % 32];
  return n % 64 < 32 ? Int4::low(byte) : Int4::high(byte);
}

inline uint8_t int4_rows_code(const Int4RowsView& v, int64_t n, int64_t k) {
  const uint8_t byte = v.row(n)[k / 32 * 16 + k % 16];
  return k % 32 < 16 ? Int4::low(byte) : Int4::high(byte);
}

}  // namespace tilewright::format
