// SPDX-License-Identifier: Apache-2.0
// A dense bfloat16 matrix behind the packed header: rows [N][Kp], Kp = K rounded up to 32, tail zero. For embeddings and
// output heads that a checkpoint keeps in float.
#pragma once

#include <cstdint>

#include "core/memory.h"
#include "format/half.h"
#include "format/header.h"

namespace tilewright::format {

inline constexpr int kBFloat16Columns = 32;  // columns of a row come in multiples of this: one cache line

struct BFloat16View {
  int64_t n, k;
  int64_t padded_k;
  const uint16_t* payload;

  const uint16_t* row(int64_t r) const { return payload + r * padded_k; }
};

inline BFloat16View bfloat16_layout(int64_t n, int64_t k) { return {n, k, round_up(k, kBFloat16Columns), nullptr}; }

inline BFloat16View bfloat16_view(const void* blob, int64_t blob_bytes, const char* op) {
  const PackedHeader header = read_header(blob, blob_bytes, FormatId::kBFloat16, op);
  check_shape(header, op);
  BFloat16View view = bfloat16_layout(header.rows, header.cols);
  check_payload(header, view.n * view.padded_k * 2, blob_bytes, op);
  view.payload = reinterpret_cast<const uint16_t*>(static_cast<const uint8_t*>(blob) + sizeof(header));
  return view;
}

}  // namespace tilewright::format
