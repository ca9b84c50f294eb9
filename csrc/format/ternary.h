// SPDX-License-Identifier: Apache-2.0
// Ternary weights in {-1, 0, 1}: where each packing keeps the value of row n, column k. The only file that knows; plain
// constexpr, so that kernels of every device read it.
//
//   name   bits   for                    rows together
//   q2     2      CPU, dot products      64: four tiles of 16 rows x 16 columns; a 32-bit lane of a tile is a row, plane
//                                        p (bits 2p) of its byte j is column 4p + j
//   t3w    1.78   CPU, table lookup      64: a 16-bit word is nine columns of a row, three base-3 indices of five bits
//   t5     1.6    storage                1: five columns a byte in base 3
//   mma2   2      tensor cores           64: four panels of 16 rows x 128 columns, in the order of matrix fragments
//   i2_s   2      bitnet.cpp             1: runs of 128 columns; byte j holds j, 32+j, 64+j, 96+j from the top bits down
//   tq1_0  1.69   llama.cpp              1: blocks of 256 in base 3, most significant first, and a float16 scale
//   tq2_0  2.06   llama.cpp              1: blocks of 256 in two bits and a float16 scale
//   hf     2      transformers' BitNet   all: four row blocks share the bytes of the first
//
// Digits are w + 1 everywhere but in mma2, which stores w itself in two's complement. Padding holds w = 0.
#pragma once

#include <cstdint>

#include "core/memory.h"

namespace tilewright::format {

struct Ternary2 {
  static constexpr int kPerByte = 4;
  static constexpr uint8_t kInvalidDigit = 3;

  static constexpr uint8_t digit(uint8_t byte, int lane) { return (byte >> (2 * lane)) & 3; }
  static constexpr int8_t trit(uint8_t byte, int lane) { return static_cast<int8_t>(digit(byte, lane) - 1); }
  static constexpr uint8_t pack(const int8_t* trits) {
    uint8_t byte = 0;
    for (int lane = 0; lane < kPerByte; ++lane) byte |= static_cast<uint8_t>((trits[lane] + 1) << (2 * lane));
    return byte;
  }
};

struct Ternary5 {
  static constexpr int kPerByte = 5;
  static constexpr int kCodes = 243;

  static constexpr int8_t trit(uint8_t byte, int lane) {
    for (; lane > 0; --lane) byte = static_cast<uint8_t>(byte / 3);
    return static_cast<int8_t>(byte % 3 - 1);
  }
  static constexpr uint8_t pack(const int8_t* trits) {
    int byte = 0;
    for (int lane = kPerByte - 1; lane >= 0; --lane) byte = 3 * byte + trits[lane] + 1;
    return static_cast<uint8_t>(byte);
  }
};

static_assert(Ternary5::kCodes <= 256 && Ternary5::kCodes == 3 * 3 * 3 * 3 * 3);

enum class TernaryPacking : uint16_t { kQ2 = 0, kT3w = 1, kT5 = 2, kMma2 = 3, kI2S = 4, kTq1 = 5, kTq2 = 6, kHf = 7 };
inline constexpr int kTernaryPackings = 8;

// Two bits of one byte.
struct TernaryPlace {
  int64_t byte;
  int shift;
};

struct TernaryQ2 {
  static constexpr int kRowsPerTile = 16;
  static constexpr int kTilesPerBlock = 4;
  static constexpr int kRowsPerBlock = kRowsPerTile * kTilesPerBlock;
  static constexpr int kColsPerStep = 16;
  static constexpr int kPlanes = 4;
  static constexpr int kColsPerPlane = 4;
  static constexpr int kBytesPerTile = kRowsPerTile * 4;
  static constexpr int kBytesPerStep = kBytesPerTile * kTilesPerBlock;

  static constexpr int64_t steps(int64_t k) { return ceil_div(k, kColsPerStep); }
  static constexpr int64_t block_bytes(int64_t k) { return steps(k) * kBytesPerStep; }
  static constexpr TernaryPlace place(int64_t cols, int64_t row, int64_t k) {
    const int64_t r = row % kRowsPerBlock, c = k % kColsPerStep;
    return {row / kRowsPerBlock * block_bytes(cols) + k / kColsPerStep * kBytesPerStep +
                r / kRowsPerTile * kBytesPerTile + r % kRowsPerTile * 4 + c % kColsPerPlane,
            static_cast<int>(c / kColsPerPlane) * 2};
  }
};

struct TernaryT3w {
  static constexpr int kRowsPerBlock = 64;
  static constexpr int kRowsPerVector = 32;
  static constexpr int kColsPerIndex = 3;
  static constexpr int kIndices = 3;  // of a word
  static constexpr int kColsPerWord = kColsPerIndex * kIndices;
  static constexpr int kBitsPerIndex = 5;
  static constexpr int kEntries = 27;  // of a table
  static constexpr int kBytesPerWordGroup = kRowsPerBlock * 2;
  static constexpr int kZeroIndex = 13;  // three zeros
  static constexpr uint16_t kZeroWord = kZeroIndex * (1 + (1 << 5) + (1 << 10));

  static constexpr int64_t words(int64_t k) { return ceil_div(k, kColsPerWord); }
  static constexpr int64_t block_bytes(int64_t k) { return words(k) * kBytesPerWordGroup; }
  // Byte where the word of a row and its columns from 9 * word on starts.
  static constexpr int64_t word_at(int64_t cols, int64_t row, int64_t word) {
    return row / kRowsPerBlock * block_bytes(cols) + word * kBytesPerWordGroup + row % kRowsPerBlock * 2;
  }
  static constexpr int digit(uint16_t word, int column) {
    int index = (word >> (column / kColsPerIndex * kBitsPerIndex)) & 31;
    for (int d = column % kColsPerIndex; d > 0; --d) index /= 3;
    return index % 3;
  }
  static constexpr uint16_t weight_of(int column) {
    int value = 1 << (column / kColsPerIndex * kBitsPerIndex);
    for (int d = column % kColsPerIndex; d > 0; --d) value *= 3;
    return static_cast<uint16_t>(value);
  }
};

// Register i of a 16 x 32 fragment (mma.m16n8k32, and each warp's part of wgmma) holds, for thread 4g + c, four columns
// from 16 (i / 2) + 4c on of fragment row g + 8 (i % 2). Fragment row g is row 2g of the panel here and g + 8 row 2g + 1, so
// that a thread's results are neighbours in memory. All four registers are one 32-bit word: byte j bits 2(3 - i) are column
// j of register i, in two's complement. So (word << 2i) & 0xC0C0C0C0 is register i as four signed bytes of 64 w: two
// instructions for four weights, and no correction by the sum of the activations. A thread's four words for 128 columns
// are adjacent, hence a panel's 512 bytes are one 16-byte load of each thread of a warp.
struct TernaryMma2 {
  static constexpr int kRowsPerPanel = 16;
  static constexpr int kPanels = 4;
  static constexpr int kRowsPerBlock = kRowsPerPanel * kPanels;
  static constexpr int kColsPerChunk = 128;
  static constexpr int kColsPerStep = 32;
  static constexpr int kBytesPerPanel = 512;
  static constexpr int kBytesPerChunk = kBytesPerPanel * kPanels;
  static constexpr int kScale = 64;  // of a decoded byte
  static constexpr int kScaleBits = 6;
  static constexpr uint32_t kMask = 0xC0C0C0C0u;
  // 64 * 128 * kMaxColsPerSum = 2^30: sums over more columns are taken in parts.
  static constexpr int64_t kMaxColsPerSum = int64_t{1} << 17;

  static constexpr int64_t chunks(int64_t k) { return ceil_div(k, kColsPerChunk); }
  static constexpr int64_t block_bytes(int64_t k) { return chunks(k) * kBytesPerChunk; }
  static constexpr TernaryPlace place(int64_t cols, int64_t row, int64_t k) {
    const int64_t r = row % kRowsPerPanel, c = k % kColsPerStep;
    const int64_t thread = r / 2 * 4 + c % 16 / 4;
    const int64_t reg = r % 2 + c / 16 * 2;
    return {row / kRowsPerBlock * block_bytes(cols) + k / kColsPerChunk * kBytesPerChunk +
                row % kRowsPerBlock / kRowsPerPanel * kBytesPerPanel + thread * 16 +
                k % kColsPerChunk / kColsPerStep * 4 + c % 4,
            static_cast<int>(3 - reg) * 2};
  }
};
static_assert(int64_t{TernaryMma2::kScale} * 128 * TernaryMma2::kMaxColsPerSum < INT32_MAX);

struct TernaryI2S {
  static constexpr int kColsPerRun = 128;
  static constexpr int kBytesPerRun = 32;

  static constexpr int64_t row_bytes(int64_t k) { return ceil_div(k, kColsPerRun) * kBytesPerRun; }
  static constexpr TernaryPlace place(int64_t cols, int64_t row, int64_t k) {
    const int64_t c = k % kColsPerRun;
    return {row * row_bytes(cols) + k / kColsPerRun * kBytesPerRun + c % kBytesPerRun,
            static_cast<int>(3 - c / kBytesPerRun) * 2};
  }
};

struct TernaryTq2 {
  static constexpr int kColsPerBlock = 256;
  static constexpr int kScaleAt = 64;
  static constexpr int kBytesPerBlock = 66;

  static constexpr int64_t row_bytes(int64_t k) { return ceil_div(k, kColsPerBlock) * kBytesPerBlock; }
  static constexpr TernaryPlace place(int64_t cols, int64_t row, int64_t k) {
    const int64_t c = k % kColsPerBlock;
    return {row * row_bytes(cols) + k / kColsPerBlock * kBytesPerBlock + c / 128 * 32 + c % 32,
            static_cast<int>(c % 128 / 32) * 2};
  }
};

// Byte b of a base-3 number is ceil(256 v / 243), so that its first digit is (3 b) >> 8 and the rest follow by b <- 3 b.
struct TernaryTq1 {
  static constexpr int kColsPerBlock = 256;
  static constexpr int kDigitBytes = 52;  // 32 and 16 bytes of five digits, four bytes of four
  static constexpr int kScaleAt = kDigitBytes;
  static constexpr int kBytesPerBlock = 54;

  static constexpr int64_t row_bytes(int64_t k) { return ceil_div(k, kColsPerBlock) * kBytesPerBlock; }
  static constexpr int digits(int byte) { return byte < 48 ? 5 : 4; }
  // Column of a block that digit d of a byte stands for.
  static constexpr int column(int byte, int d) {
    if (byte < 32) return d * 32 + byte;
    return byte < 48 ? 160 + d * 16 + byte - 32 : 240 + d * 4 + byte - 48;
  }
  static constexpr int digit(uint8_t byte, int d) {
    for (; d > 0; --d) byte = static_cast<uint8_t>(byte * 3);
    return byte * 3 >> 8;
  }
  static constexpr uint8_t encode(int value) { return static_cast<uint8_t>((value * 256 + 242) / 243); }
};

struct TernaryHf {
  static constexpr int64_t packed_rows(int64_t n) { return ceil_div(n, 4); }
  static constexpr TernaryPlace place(int64_t rows, int64_t cols, int64_t row, int64_t k) {
    const int64_t quarter = packed_rows(rows);
    return {row % quarter * cols + k, static_cast<int>(row / quarter) * 2};
  }
};

}  // namespace tilewright::format
