// SPDX-License-Identifier: Apache-2.0
// What launches of the tensor-core form share.
#pragma once

#include "ops/local_linear_attention/cuda/flash.cuh"

namespace tilewright::local_linear_attention::cuda {

// [rows, heads, size] as boxes of one head: 128 bytes of so many rows.
template <class T>
hopper::TensorMap map_of(const void* base, int64_t rows, int64_t heads, int64_t size, int box_rows) {
  const auto bytes = static_cast<uint64_t>(size) * sizeof(T);
  const uint64_t sizes[3] = {static_cast<uint64_t>(size), static_cast<uint64_t>(heads), static_cast<uint64_t>(rows)};
  const uint64_t strides[2] = {bytes, bytes * static_cast<uint64_t>(heads)};
  const uint32_t box[3] = {128 / sizeof(T), 1, static_cast<uint32_t>(box_rows)};
  return hopper::make_tensor_map<T>(base, 3, sizes, strides, box, hopper::Swizzle::k128);
}

// Blocks of 128 rows, `each` a sequence unless packed: a packed one has at most one more than its length in whole blocks.
inline int64_t blocks_of(const Sequences& s, int64_t each) {
  const int64_t blocks = ((s.offsets == nullptr ? each : s.rows) + kBlockRows - 1) / kBlockRows;
  return s.offsets == nullptr ? blocks * s.count : blocks + s.count;
}

}  // namespace tilewright::local_linear_attention::cuda
