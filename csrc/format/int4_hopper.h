// SPDX-License-Identifier: Apache-2.0
// INT4 weights as the Hopper kernels stream them, and the only shifts between this layout and the others.
//
// A chunk is 64 rows by 128 columns: what one warpgroup multiplies by in four steps of 32 columns. It holds
//   codes    [2 pairs of steps][128 threads][2 steps][2 row halves] words of 32 bits
//   scales   [128 / sub][64 rows in row order]
//   offsets  [128 / sub][64 rows in row order]      absent when symmetric; a zero point is stored in the type of the scales
// and chunks follow one another along K, then along N. Thread t = 32 w + 4 r + c of a warpgroup loads 16 bytes twice and
// has its part of the register operand: word h of a step is row 16 w + r + 8 h, the low nibbles of its bytes 0-3 columns
// 4 c to 4 c + 3, the high nibbles columns 16 + 4 c to 16 + 4 c + 3. Row order puts rows r and r + 8 of a warp side by side.
//
// An e4m3 byte whose upper four bits, the sign aside, are zero is that number times 2^-9. So a nibble needs only to be put
// in the low bits of a byte, and its sign, if it has one, in the top bit:
//   signed    q in -7..7: magnitude in the low 3 bits of its nibble. The sign of a low nibble is bit 7 of the same byte, that
//             of a high nibble bit 3 of the next byte (of the first one for byte 3): after a rotation by 4 it is bit 7 too.
//   unsigned  u in 0..15: the plain nibble.
// `sub` is the most columns, up to 128, that never straddle two groups: the unit of scaling.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>

#include "format/int4.h"

namespace tilewright::format {

struct Int4Hopper {
  static constexpr int kRows = 64;
  static constexpr int kCols = 128;
  static constexpr int kThreads = 128;
  static constexpr int kCodeBytes = kRows * kCols / 2;
  static constexpr int kPayloadOffset = 256;  // of the first chunk in the blob: chunks start at multiples of 128 bytes
  static constexpr int kExponent = 9;  // a byte that the kernels multiply by is code * 2^-kExponent

  static constexpr uint32_t signed_low(uint32_t word) { return word & 0x87878787u; }
  static constexpr uint32_t signed_high(uint32_t word) { return ((word >> 4) | (word << 28)) & 0x87878787u; }
  static constexpr uint32_t unsigned_low(uint32_t word) { return word & 0x0f0f0f0fu; }
  static constexpr uint32_t unsigned_high(uint32_t word) { return (word >> 4) & 0x0f0f0f0fu; }

  // Byte offset in a chunk of the word of a row whose low nibbles are columns 32 step + 4 c to + 3.
  static constexpr int word_offset(int row, int step, int c) {
    const int thread = row / 16 * 32 + row % 8 * 4 + c;
    return step / 2 * (kThreads * 16) + thread * 16 + (step % 2 * 2 + row % 16 / 8) * 4;
  }
  // Position of a row among the scales of a chunk.
  static constexpr int row_order(int row) { return (row / 16 * 8 + row % 8) * 2 + row % 16 / 8; }

  // Words from four codes u and four more, one a byte, and back.
  static constexpr uint32_t unsigned_word(uint32_t low, uint32_t high) { return low | high << 4; }
  static constexpr uint32_t signed_word(uint32_t low, uint32_t high) {
    const uint32_t l = sign_and_magnitude(low), h = sign_and_magnitude(high);
    return l | ((h << 4) | (h >> 28));
  }
  static constexpr uint32_t codes_of_signed(uint32_t bytes) {
    const uint32_t negative = bytes >> 7 & 0x01010101u, magnitude = bytes & 0x07070707u;
    return (magnitude ^ negative * 0x0f) + negative + 0x08080808u - negative * 0x10;
  }

 private:
  // Bytes of codes u = q + 8, q in -7..7, to e4m3 bytes of q * 2^-9.
  static constexpr uint32_t sign_and_magnitude(uint32_t codes) {
    const uint32_t negative = ~codes >> 3 & 0x01010101u;
    return ((codes & 0x07070707u) ^ negative * 7) + negative + (negative << 7);
  }
};

struct Int4HopperView {
  int64_t n, k, group;
  int64_t blocks;  // of 64 rows
  int64_t tiles;  // of 128 columns
  int sub;  // columns under one stored scale: 16, 32, 64 or 128
  ScaleType scale_type;
  OffsetKind offset_kind;
  bool signed_codes;  // q = u - 8 in sign and magnitude; otherwise u itself
  int64_t chunk_bytes;

  int subs() const { return Int4Hopper::kCols / sub; }
  int64_t payload_bytes() const { return blocks * tiles * chunk_bytes; }
  int64_t blob_bytes() const { return Int4Hopper::kPayloadOffset + payload_bytes(); }
  int64_t chunk_at(int64_t block, int64_t tile) const { return (block * tiles + tile) * chunk_bytes; }
  int64_t scale_at(int row, int64_t sub_index) const {
    return Int4Hopper::kCodeBytes +
           (sub_index * Int4Hopper::kRows + Int4Hopper::row_order(row)) * scale_bytes(scale_type);
  }
  int64_t offset_at(int row, int64_t sub_index) const {
    return scale_at(row, sub_index) + subs() * Int4Hopper::kRows * scale_bytes(scale_type);
  }
};

inline Int4HopperView int4_hopper_layout(int64_t n, int64_t k, int64_t group, ScaleType scale_type, OffsetKind kind,
                                         bool signed_codes) {
  Int4HopperView view{};
  view.n = n;
  view.k = k;
  view.group = group;
  view.blocks = ceil_div(n, Int4Hopper::kRows);
  view.tiles = ceil_div(k, Int4Hopper::kCols);
  view.sub = group >= k ? Int4Hopper::kCols : static_cast<int>(std::gcd(group, int64_t{Int4Hopper::kCols}));
  view.scale_type = scale_type;
  view.offset_kind = kind;
  view.signed_codes = signed_codes;
  const int64_t numbers = kind == OffsetKind::kSymmetric ? 1 : 2;
  view.chunk_bytes = Int4Hopper::kCodeBytes + numbers * view.subs() * Int4Hopper::kRows * scale_bytes(scale_type);
  return view;
}

// What a caller must know of a blob that it cannot read, because it lies on a device: everything but the shape, in one
// positive number. 0 stands for the CPU's layout, which is read from its header.
inline int64_t int4_hopper_word(const Int4HopperView& view) {
  return view.group << 8 | (view.signed_codes ? 1 << 5 : 0) | static_cast<int64_t>(view.offset_kind) << 3 |
         static_cast<int64_t>(view.scale_type) << 1 | 1;
}

inline Int4HopperView int4_hopper_from_word(int64_t n, int64_t k, int64_t word, const char* op) {
  const auto type = static_cast<ScaleType>(word >> 1 & 3);
  const auto kind = static_cast<OffsetKind>(word >> 3 & 3);
  require((word & 1) == 1 && word > 0 && type <= ScaleType::kFloat32 && kind <= OffsetKind::kZeroPoint, op,
          ": layout = ", word, " is not one that PackedInt4.layout holds");
  require_group(word >> 8, op);
  return int4_hopper_layout(n, k, word >> 8, type, kind, (word >> 5 & 1) != 0);
}

inline Int4HopperView int4_hopper_view(const void* blob, int64_t blob_bytes, const char* op) {
  const PackedHeader header = read_header(blob, blob_bytes, FormatId::kInt4Hopper, op);
  check_shape(header, op);
  require_group(header.group, op);
  require(header.scale_type <= ScaleType::kFloat32 && header.offset_kind <= OffsetKind::kZeroPoint, op,
          ": weight header states an unknown scale or offset type");
  const Int4HopperView view = int4_hopper_layout(header.rows, header.cols, header.group, header.scale_type,
                                                 header.offset_kind, header.variant != 0);
  constexpr int64_t kBefore = Int4Hopper::kPayloadOffset - static_cast<int64_t>(sizeof(PackedHeader));
  check_payload(header, kBefore + view.payload_bytes(), blob_bytes, op);
  return view;
}

namespace detail {

// Four codes of a row from column k on, one a byte; fill where there is no such column.
inline uint32_t four_codes(const Int4View& cpu, int64_t row, int64_t k, uint8_t fill) {
  uint32_t codes = fill * 0x01010101u;
  if (k >= cpu.k) return codes;
  const int64_t step = k / Int4::kColsPerStep, g = step / cpu.steps_per_group;
  uint32_t word;
  std::memcpy(&word,
              cpu.codes(row / Int4::kRowsPerBlock, g) + (step - g * cpu.steps_per_group) * Int4::kBytesPerStep +
                  row % Int4::kRowsPerBlock * 4,
              sizeof(word));
  const uint32_t valid = cpu.k - k >= 4 ? ~0u : (1u << (8 * (cpu.k - k))) - 1;
  return (word >> (k % Int4::kColsPerStep) & 0x0f0f0f0fu & valid) | (codes & ~valid);
}

}  // namespace detail

// True if the rows [first, last) of a symmetric weight have no code -8, which sign and magnitude in 4 bits cannot hold.
inline bool int4_fits_signed(const Int4View& cpu, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    for (int64_t k = 0; k < cpu.k; k += 4) {
      if (((detail::four_codes(cpu, row, k, Int4::kSymmetricZero) - 0x01010101u) & 0x80808080u) != 0) return false;
    }
  }
  return true;
}

namespace detail {

inline void copy_number(void* to, const void* from, int64_t index, int64_t bytes) {
  std::memcpy(to, static_cast<const uint8_t*>(from) + index * bytes, static_cast<size_t>(bytes));
}

// A small whole number (a zero point) in the type of the scales; exact up to 255 in each.
inline uint16_t byte_to_f16(uint8_t value) {
  if (value == 0) return 0;
  const int exponent = std::bit_width(static_cast<unsigned>(value)) - 1;
  return static_cast<uint16_t>((exponent + 15) << 10 | (value << (10 - exponent) & 0x3ff));
}

inline void store_byte_as_scale(void* to, uint8_t value, ScaleType type) {
  const auto number = static_cast<float>(value);
  if (type == ScaleType::kFloat32) {
    std::memcpy(to, &number, sizeof(number));
    return;
  }
  const uint16_t bits = type == ScaleType::kBFloat16 ? float_to_bf16(number) : byte_to_f16(value);
  std::memcpy(to, &bits, sizeof(bits));
}

}  // namespace detail

// Chunks of rows [64 first, 64 last) from the CPU's layout.
inline void int4_to_hopper(const Int4View& cpu, const Int4HopperView& view, uint8_t* payload, int64_t first,
                           int64_t last) {
  const int64_t s_bytes = scale_bytes(cpu.scale_type);
  std::memset(payload + view.chunk_at(first, 0), 0, static_cast<size_t>(view.chunk_at(last - first, 0)));
  for (int64_t row = first * Int4Hopper::kRows; row < std::min(cpu.n, last * Int4Hopper::kRows); ++row) {
    const int r = static_cast<int>(row % Int4Hopper::kRows);
    uint8_t* line = payload + view.chunk_at(row / Int4Hopper::kRows, 0);
    const uint8_t fill = view.signed_codes ? Int4::kSymmetricZero : 0;
    for (int64_t k = 0; k < cpu.k; k += 32) {
      for (int c = 0; c < 4; ++c) {
        const uint32_t low = detail::four_codes(cpu, row, k + 4 * c, fill);
        const uint32_t high = detail::four_codes(cpu, row, k + 16 + 4 * c, fill);
        const uint32_t word =
            view.signed_codes ? Int4Hopper::signed_word(low, high) : Int4Hopper::unsigned_word(low, high);
        std::memcpy(line + view.chunk_at(0, k / Int4Hopper::kCols) +
                        Int4Hopper::word_offset(r, static_cast<int>(k % Int4Hopper::kCols / 32), c),
                    &word, sizeof(word));
      }
    }
    for (int64_t k = 0; k < cpu.k; k += view.sub) {
      const int64_t b = row / Int4::kRowsPerBlock, g = k / cpu.group, lane = row % Int4::kRowsPerBlock;
      const int64_t s = k % Int4Hopper::kCols / view.sub;
      uint8_t* chunk = line + view.chunk_at(0, k / Int4Hopper::kCols);
      detail::copy_number(chunk + view.scale_at(r, s), cpu.scales(b, g), lane, s_bytes);
      if (cpu.offset_kind == OffsetKind::kMinimum) {
        detail::copy_number(chunk + view.offset_at(r, s), cpu.offsets(b, g), lane, s_bytes);
      } else if (cpu.offset_kind == OffsetKind::kZeroPoint) {
        detail::store_byte_as_scale(chunk + view.offset_at(r, s), cpu.offsets(b, g)[lane], cpu.scale_type);
      }
    }
  }
}

// The code u of element (row, k).
inline uint8_t int4_hopper_code(const Int4HopperView& view, const uint8_t* payload, int64_t row, int64_t k) {
  const int column = static_cast<int>(k % Int4Hopper::kCols);
  uint32_t word;
  std::memcpy(&word,
              payload + view.chunk_at(row / Int4Hopper::kRows, k / Int4Hopper::kCols) +
                  Int4Hopper::word_offset(static_cast<int>(row % Int4Hopper::kRows), column / 32, column % 16 / 4),
              sizeof(word));
  const bool high = column % 32 >= 16;
  const uint32_t codes = view.signed_codes ? Int4Hopper::codes_of_signed(high ? Int4Hopper::signed_high(word)
                                                                              : Int4Hopper::signed_low(word))
                         : high            ? Int4Hopper::unsigned_high(word)
                                           : Int4Hopper::unsigned_low(word);
  return static_cast<uint8_t>(codes >> (8 * (column % 4)));
}

// Canonical rows [first, last) back from the Hopper layout: codes [N][ceil(K/2)], scales and offsets [N][G].
inline void int4_from_hopper(const Int4HopperView& view, const uint8_t* payload, uint8_t* codes, uint8_t* scales,
                             uint8_t* offsets, int64_t first, int64_t last) {
  const int64_t row_bytes = ceil_div(view.k, 2), groups = ceil_div(view.k, view.group);
  const int64_t s_bytes = scale_bytes(view.scale_type), o_bytes = offset_bytes(view.offset_kind, view.scale_type);
  for (int64_t row = first; row < last; ++row) {
    const int r = static_cast<int>(row % Int4Hopper::kRows);
    for (int64_t k = 0; k < view.k; k += 2) {
      const uint8_t high = k + 1 < view.k ? int4_hopper_code(view, payload, row, k + 1) : 0;
      codes[row * row_bytes + k / 2] = Int4::pair(int4_hopper_code(view, payload, row, k), high);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t k = g * view.group, s = k % Int4Hopper::kCols / view.sub, at = row * groups + g;
      const uint8_t* chunk = payload + view.chunk_at(row / Int4Hopper::kRows, k / Int4Hopper::kCols);
      std::memcpy(scales + at * s_bytes, chunk + view.scale_at(r, s), static_cast<size_t>(s_bytes));
      if (view.offset_kind == OffsetKind::kMinimum) {
        std::memcpy(offsets + at * o_bytes, chunk + view.offset_at(r, s), static_cast<size_t>(o_bytes));
      } else if (view.offset_kind == OffsetKind::kZeroPoint) {
        offsets[at] = static_cast<uint8_t>(load_scale(chunk + view.offset_at(r, s), 0, view.scale_type));
      }
    }
  }
}

}  // namespace tilewright::format
