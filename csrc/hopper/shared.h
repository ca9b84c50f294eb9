// SPDX-License-Identifier: Apache-2.0
// Shared memory: where it starts, how tiles swizzle their rows, and the descriptors by which wgmma finds them.
//
// A tile with swizzle S is cut into panels of S bytes width; a panel is its rows, S bytes each, one after the other, and
// within 8 rows the 16-byte columns change places so that a column of 8 rows touches every bank once. That is what a TMA
// box of S bytes by Rows writes and what a wgmma descriptor reads. The pattern is tied to the address: tiles start at
// multiples of 1024 bytes.
#pragma once

#include "hopper/types.h"

namespace tilewright::hopper {

enum class Swizzle : int { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

// Bytes of a row of a panel. Without swizzle a panel is one 16-byte column: wgmma's core matrices are then contiguous.
constexpr int panel_bytes(Swizzle swizzle) { return swizzle == Swizzle::kNone ? 16 : static_cast<int>(swizzle); }

// Physical offset of a logical byte offset within a panel.
template <Swizzle S>
TILEWRIGHT_BOTH constexpr uint32_t swizzled(uint32_t offset) {
  if constexpr (S == Swizzle::k128) return offset ^ ((offset >> 3) & 0x70u);
  if constexpr (S == Swizzle::k64) return offset ^ ((offset >> 3) & 0x30u);
  if constexpr (S == Swizzle::k32) return offset ^ ((offset >> 3) & 0x10u);
  return offset;
}

// A matrix operand in shared memory as wgmma is told of it (PTX, "matrix descriptor"): bits 0-13 start, 16-29 leading
// offset, 32-45 stride offset, all in 16 bytes; 62-63 swizzle.
struct Descriptor {
  uint64_t bits;

  // The same operand some bytes further on.
  TILEWRIGHT_BOTH Descriptor advanced(int bytes) const { return {bits + static_cast<uint64_t>(bytes >> 4)}; }

  static TILEWRIGHT_BOTH Descriptor make(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
    const uint64_t mode = swizzle == Swizzle::kNone  ? 0
                          : swizzle == Swizzle::k128 ? 1
                          : swizzle == Swizzle::k64  ? 2
                                                     : 3;
    return {static_cast<uint64_t>((address & 0x3ffffu) >> 4) | static_cast<uint64_t>((leading & 0x3ffffu) >> 4) << 16 |
            static_cast<uint64_t>((stride & 0x3ffffu) >> 4) << 32 | mode << 62};
  }
};

#if defined(__CUDACC__)

// The block's dynamic shared memory.
TILEWRIGHT_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char tilewright_shared_memory[];
  return tilewright_shared_memory;
}

TILEWRIGHT_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#else
#include "emulator/shared.h"
#endif

template <class T, int Rows, int Cols, Swizzle S>
struct Tile {
  static constexpr int kRows = Rows;
  static constexpr int kCols = Cols;
  static constexpr int kPanelBytes = panel_bytes(S);
  static constexpr int kPanelCols = kPanelBytes / static_cast<int>(sizeof(T));
  static constexpr int kPanels = Cols / kPanelCols;
  static constexpr int kBytesPerPanel = Rows * kPanelBytes;
  static constexpr int kBytes = kPanels * kBytesPerPanel;
  static_assert(Cols % kPanelCols == 0, "a tile is a whole number of swizzle panels wide");
  static_assert(Rows % 8 == 0, "the swizzle pattern repeats every 8 rows");

  // Bytes from the start of the tile to an element.
  static TILEWRIGHT_BOTH constexpr uint32_t offset(int row, int col) {
    const int panel = col / kPanelCols;
    const int within = row * kPanelBytes + (col % kPanelCols) * static_cast<int>(sizeof(T));
    return static_cast<uint32_t>(panel * kBytesPerPanel) + swizzled<S>(static_cast<uint32_t>(within));
  }

  static TILEWRIGHT_DEVICE T* at(void* tile, int row, int col) {
    return reinterpret_cast<T*>(static_cast<char*>(tile) + offset(row, col));
  }
  static TILEWRIGHT_DEVICE const T* at(const void* tile, int row, int col) {
    return reinterpret_cast<const T*>(static_cast<const char*>(tile) + offset(row, col));
  }

  // Rows are M or N, columns are K: the operand that starts at (row, k). row % 8 == 0; k a multiple of 32 bytes.
  static TILEWRIGHT_DEVICE Descriptor k_major(const void* tile, int row, int k) {
    const uint32_t start =
        shared_address(tile) + static_cast<uint32_t>((k / kPanelCols) * kBytesPerPanel + row * kPanelBytes +
                                                     (k % kPanelCols) * static_cast<int>(sizeof(T)));
    if constexpr (S == Swizzle::kNone) return Descriptor::make(start, kBytesPerPanel, 8 * kPanelBytes, S);
    return Descriptor::make(start, 16, 8 * kPanelBytes, S);
  }

  // Rows are K, columns are M or N: the operand that starts at (k, mn). k % 8 == 0; mn a multiple of kPanelCols.
  static TILEWRIGHT_DEVICE Descriptor mn_major(const void* tile, int k, int mn) {
    const uint32_t start =
        shared_address(tile) + static_cast<uint32_t>((mn / kPanelCols) * kBytesPerPanel + k * kPanelBytes);
    if constexpr (S == Swizzle::kNone) return Descriptor::make(start, 8 * kPanelBytes, kBytesPerPanel, S);
    return Descriptor::make(start, kBytesPerPanel, 8 * kPanelBytes, S);
  }
};

}  // namespace tilewright::hopper
