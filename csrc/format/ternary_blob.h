// SPDX-License-Identifier: Apache-2.0
// A packed ternary weight: the 64-byte header, then the payload that csrc/format/ternary.h lays out. Functions are inline
// and meant for files of the baseline level; kernels of a level see the view alone.
#pragma once

#include <algorithm>
#include <cstring>

#include "format/half.h"
#include "format/header.h"
#include "format/ternary.h"

namespace tilewright::format {

struct TernaryView {
  int64_t n, k;
  TernaryPacking packing;
  const uint8_t* payload;
};

inline const char* ternary_name(TernaryPacking packing) {
  constexpr const char* kNames[kTernaryPackings] = {"q2", "t3w", "t5", "mma2", "i2_s", "tq1_0", "tq2_0", "hf"};
  return kNames[static_cast<int>(packing)];
}

inline TernaryPacking ternary_packing(int64_t id, const char* op) {
  require(id >= 0 && id < kTernaryPackings, op, ": packing = ", id, ", needed 0 to ", kTernaryPackings - 1,
          "; use the fields of PackedTernary");
  return static_cast<TernaryPacking>(id);
}

// Rows that share bytes: pieces of this many rows may be packed and read independently.
inline int64_t ternary_rows_together(const TernaryView& view) {
  switch (view.packing) {
    case TernaryPacking::kQ2: return TernaryQ2::kRowsPerBlock;
    case TernaryPacking::kT3w: return TernaryT3w::kRowsPerBlock;
    case TernaryPacking::kMma2: return TernaryMma2::kRowsPerBlock;
    case TernaryPacking::kHf: return std::max<int64_t>(view.n, 1);
    default: return 1;
  }
}

inline int64_t ternary_payload_bytes(TernaryPacking packing, int64_t n, int64_t k) {
  switch (packing) {
    case TernaryPacking::kQ2: return ceil_div(n, TernaryQ2::kRowsPerBlock) * TernaryQ2::block_bytes(k);
    case TernaryPacking::kT3w: return ceil_div(n, TernaryT3w::kRowsPerBlock) * TernaryT3w::block_bytes(k);
    case TernaryPacking::kT5: return n * ceil_div(k, Ternary5::kPerByte);
    case TernaryPacking::kMma2: return ceil_div(n, TernaryMma2::kRowsPerBlock) * TernaryMma2::block_bytes(k);
    case TernaryPacking::kI2S: return n * TernaryI2S::row_bytes(k);
    case TernaryPacking::kTq1: return n * TernaryTq1::row_bytes(k);
    case TernaryPacking::kTq2: return n * TernaryTq2::row_bytes(k);
    case TernaryPacking::kHf: return TernaryHf::packed_rows(n) * k;
  }
  return 0;
}

inline void require_ternary_shape(TernaryPacking packing, int64_t n, int64_t k, const char* op) {
  require(n >= 0 && n < kMaxDim && k >= 0 && k < kMaxDim, op, ": weight has shape [", n, ", ", k,
          "], outside what can be packed");
  const bool foreign =
      packing == TernaryPacking::kI2S || packing == TernaryPacking::kTq1 || packing == TernaryPacking::kTq2;
  const int64_t multiple = packing == TernaryPacking::kI2S ? TernaryI2S::kColsPerRun : TernaryTq2::kColsPerBlock;
  require(!foreign || k % multiple == 0, op, ": packing '", ternary_name(packing), "' holds rows of a multiple of ",
          multiple, " columns, K = ", k, "; use 'q2', 't3w', 't5' or 'mma2'");
}

inline PackedHeader ternary_header(TernaryPacking packing, int64_t n, int64_t k) {
  PackedHeader header{};
  std::memcpy(header.magic, PackedHeader::kMagic, sizeof(header.magic));
  header.version = PackedHeader::kVersion;
  header.format = FormatId::kTernary;
  header.variant = static_cast<uint16_t>(packing);
  header.rows = n;
  header.cols = k;
  header.payload_bytes = ternary_payload_bytes(packing, n, k);
  header.per_tensor_scale = 1.0f;
  return header;
}

inline TernaryView ternary_view(const void* blob, int64_t blob_bytes, const char* op) {
  const auto bytes = static_cast<int64_t>(sizeof(PackedHeader));
  const bool ours = blob_bytes >= bytes && std::memcmp(blob, PackedHeader::kMagic, sizeof(PackedHeader::kMagic)) == 0;
  require(ours, op, ": data has ", blob_bytes, " bytes and ",
          blob_bytes < bytes ? "is shorter than" : "does not start with", " a packed header (magic, ", bytes,
          " bytes); pack the weight with pack_ternary()");
  const PackedHeader header = read_header(blob, blob_bytes, FormatId::kTernary, op);
  const TernaryPacking packing = ternary_packing(header.variant, op);
  require_ternary_shape(packing, header.rows, header.cols, op);
  check_payload(header, ternary_payload_bytes(packing, header.rows, header.cols), blob_bytes, op);
  return {header.rows, header.cols, packing, static_cast<const uint8_t*>(blob) + sizeof(header)};
}

inline TernaryPlace ternary_place(const TernaryView& view, int64_t row, int64_t k) {
  switch (view.packing) {
    case TernaryPacking::kMma2: return TernaryMma2::place(view.k, row, k);
    case TernaryPacking::kI2S: return TernaryI2S::place(view.k, row, k);
    case TernaryPacking::kTq2: return TernaryTq2::place(view.k, row, k);
    case TernaryPacking::kHf: return TernaryHf::place(view.n, view.k, row, k);
    default: return TernaryQ2::place(view.k, row, k);
  }
}

// A value outside {-1, 0, 1}, for bytes that stand for nothing.
inline constexpr int8_t kNotTernary = 2;

namespace ternary_detail {

inline void read_t5(const uint8_t* bytes, int64_t k, int8_t* out) {
  for (int64_t c = 0; c < k; ++c) {
    const uint8_t byte = bytes[c / Ternary5::kPerByte];
    const bool valid = byte < Ternary5::kCodes;
    out[c] = valid ? Ternary5::trit(byte, static_cast<int>(c % Ternary5::kPerByte)) : kNotTernary;
  }
}

inline void write_t5(const int8_t* in, int64_t k, uint8_t* bytes) {
  for (int64_t b = 0; b < ceil_div(k, Ternary5::kPerByte); ++b) {
    int8_t trits[Ternary5::kPerByte] = {};
    const int64_t count = std::min<int64_t>(Ternary5::kPerByte, k - b * Ternary5::kPerByte);
    std::copy_n(in + b * Ternary5::kPerByte, count, trits);
    bytes[b] = Ternary5::pack(trits);
  }
}

inline void read_tq1(const uint8_t* bytes, int64_t k, int8_t* out) {
  for (int64_t b = 0; b < k / TernaryTq1::kColsPerBlock; ++b) {
    for (int byte = 0; byte < TernaryTq1::kDigitBytes; ++byte) {
      for (int d = 0; d < TernaryTq1::digits(byte); ++d) {
        const uint8_t code = bytes[b * TernaryTq1::kBytesPerBlock + byte];
        out[b * TernaryTq1::kColsPerBlock + TernaryTq1::column(byte, d)] =
            static_cast<int8_t>(TernaryTq1::digit(code, d) - 1);
      }
    }
  }
}

inline void write_tq1(const int8_t* in, int64_t k, uint8_t* bytes) {
  for (int64_t b = 0; b < k / TernaryTq1::kColsPerBlock; ++b) {
    for (int byte = 0; byte < TernaryTq1::kDigitBytes; ++byte) {
      int value = 0;
      for (int d = 0; d < 5; ++d) {
        const int column = TernaryTq1::column(byte, d);
        value *= 3;
        if (d < TernaryTq1::digits(byte)) value += in[b * TernaryTq1::kColsPerBlock + column] + 1;
      }
      bytes[b * TernaryTq1::kBytesPerBlock + byte] = TernaryTq1::encode(value);
    }
  }
}

inline uint16_t load_word(const uint8_t* at) {
  uint16_t word;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

}  // namespace ternary_detail

// out[K]: one row as -1, 0, 1; kNotTernary where the bytes stand for nothing.
inline void ternary_read_row(const TernaryView& view, int64_t row, int8_t* out) {
  const int64_t k = view.k;
  switch (view.packing) {
    case TernaryPacking::kT5: return ternary_detail::read_t5(view.payload + row * ceil_div(k, 5), k, out);
    case TernaryPacking::kTq1: return ternary_detail::read_tq1(view.payload + row * TernaryTq1::row_bytes(k), k, out);
    case TernaryPacking::kT3w:
      for (int64_t c = 0; c < k; ++c) {
        const uint8_t* at = view.payload + TernaryT3w::word_at(k, row, c / TernaryT3w::kColsPerWord);
        const uint16_t word = ternary_detail::load_word(at);
        const int column = static_cast<int>(c % TernaryT3w::kColsPerWord);
        const int index = word >> (column / TernaryT3w::kColsPerIndex * TernaryT3w::kBitsPerIndex) & 31;
        out[c] = index < TernaryT3w::kEntries ? static_cast<int8_t>(TernaryT3w::digit(word, column) - 1) : kNotTernary;
      }
      return;
    default: break;
  }
  const bool complement = view.packing == TernaryPacking::kMma2;
  for (int64_t c = 0; c < k; ++c) {
    const TernaryPlace place = ternary_place(view, row, c);
    const int digit = view.payload[place.byte] >> place.shift & 3;
    out[c] = static_cast<int8_t>(complement ? (digit == 3 ? -1 : digit) : (digit == 3 ? kNotTernary : digit - 1));
  }
}

// Writes a row of -1, 0, 1 into a payload that ternary_clear() has prepared.
inline void ternary_write_row(const TernaryView& view, int64_t row, const int8_t* in, uint8_t* payload) {
  const int64_t k = view.k;
  switch (view.packing) {
    case TernaryPacking::kT5: return ternary_detail::write_t5(in, k, payload + row * ceil_div(k, 5));
    case TernaryPacking::kTq1: return ternary_detail::write_tq1(in, k, payload + row * TernaryTq1::row_bytes(k));
    case TernaryPacking::kT3w:
      for (int64_t word = 0; word < TernaryT3w::words(k); ++word) {
        uint16_t value = TernaryT3w::kZeroWord;
        const int64_t first = word * TernaryT3w::kColsPerWord;
        const int count = static_cast<int>(std::min<int64_t>(TernaryT3w::kColsPerWord, k - first));
        for (int c = 0; c < count; ++c) {
          value = static_cast<uint16_t>(value + in[first + c] * TernaryT3w::weight_of(c));
        }
        std::memcpy(payload + TernaryT3w::word_at(k, row, word), &value, sizeof(value));
      }
      return;
    default: break;
  }
  const bool complement = view.packing == TernaryPacking::kMma2;
  for (int64_t c = 0; c < k; ++c) {
    const TernaryPlace place = ternary_place(view, row, c);
    const auto digit = static_cast<uint8_t>(complement ? in[c] & 3 : in[c] + 1);
    auto& byte = payload[place.byte];
    byte = static_cast<uint8_t>((byte & ~(3 << place.shift)) | digit << place.shift);
  }
}

// Padding that stands for zeros, before any row is written.
inline void ternary_clear(const TernaryView& view, uint8_t* payload) {
  const int64_t bytes = ternary_payload_bytes(view.packing, view.n, view.k);
  if (view.packing == TernaryPacking::kT3w) {
    for (int64_t i = 0; i < bytes; i += 2) std::memcpy(payload + i, &TernaryT3w::kZeroWord, 2);
    return;
  }
  const bool ones = view.packing == TernaryPacking::kQ2;  // digit 1 in every place
  std::fill_n(payload, bytes, ones ? uint8_t{0x55} : uint8_t{0});
}

// The float16 scale of each block of a row, for the two packings of llama.cpp.
inline int64_t ternary_scale_blocks(const TernaryView& view) {
  const bool has = view.packing == TernaryPacking::kTq1 || view.packing == TernaryPacking::kTq2;
  return has ? view.k / TernaryTq2::kColsPerBlock : 0;
}
inline int64_t ternary_scale_at(const TernaryView& view, int64_t row, int64_t block) {
  return view.packing == TernaryPacking::kTq1
             ? row * TernaryTq1::row_bytes(view.k) + block * TernaryTq1::kBytesPerBlock + TernaryTq1::kScaleAt
             : row * TernaryTq2::row_bytes(view.k) + block * TernaryTq2::kBytesPerBlock + TernaryTq2::kScaleAt;
}

}  // namespace tilewright::format
