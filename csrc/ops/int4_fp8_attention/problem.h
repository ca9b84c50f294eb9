// SPDX-License-Identifier: Apache-2.0
// out[T,H,D] = softmax(scale * q k^T + mask) v over a KV cache in INT4 or bfloat16, and the append that fills it.
#pragma once

#include <cstdint>

#include "format/int4.h"
#include "format/int4_kv.h"

namespace tilewright::int4_fp8_attention {

inline constexpr int64_t kMaxHeadDim = 256;

enum class CacheFormat : uint8_t { kInt4 = 0, kBFloat16 = 1 };

// Fp8: each token and head of q becomes e4m3(q / s) with s = max|q| / 448, as hardware with FP8 products needs it.
enum class Query : uint8_t { kFp8 = 0, kFloat32 = 1 };

struct Strides {
  int64_t sequence, head, token;  // bytes
};

// The cache of one layer: views into memory of the caller. Elements of one row are adjacent; rows lie where the strides
// say. Sizes and addresses need no alignment beyond that of their type.
struct Cache {
  CacheFormat format;
  format::ScaleType scale_type;  // kFloat32 or kBFloat16; INT4 only
  int64_t heads;  // H_kv
  int64_t head_dim;  // D, 1..256
  int64_t capacity;  // L, tokens a sequence can hold
  uint8_t* k;  // [S, H_kv, L, row_bytes]
  uint8_t* v;
  uint8_t* k_scales;  // [S, H_kv, L, groups] of scale_type; null for bfloat16
  uint8_t* v_scales;
  Strides data;  // of k and v
  Strides scales;  // of k_scales and v_scales
};

constexpr int64_t row_bytes(CacheFormat format, int64_t head_dim) {
  return format == CacheFormat::kInt4 ? format::Int4Kv::row_bytes(head_dim) : 2 * head_dim;
}
inline int64_t scale_row_bytes(CacheFormat format, format::ScaleType type, int64_t head_dim) {
  return format == CacheFormat::kInt4 ? format::Int4Kv::groups(head_dim) * format::scale_bytes(type) : 0;
}
// Strides of a dense [S, H_kv, L, row].
inline Strides dense(int64_t heads, int64_t capacity, int64_t row) {
  return {heads * capacity * row, capacity * row, row};
}

// T new tokens, packed: sequence s owns rows cu_seqlens[s] .. cu_seqlens[s+1], n_s of them, and holds lengths[s] tokens
// once they are in the cache; row i of sequence s sits at position lengths[s] - n_s + i.
struct Packed {
  int64_t sequences;  // S
  const int64_t* cu_seqlens;  // [S+1], from 0 to T
  const int64_t* lengths;  // [S], the new tokens included
};

struct Append {
  Cache cache;
  Packed packed;
  const float* k;  // [T, H_kv, D]; elements of a head are adjacent
  const float* v;
  int64_t token_stride;  // of k and v, in elements
  int64_t head_stride;
};

inline constexpr int64_t kNoWindow = int64_t{1} << 62;

struct Problem {
  Cache cache;
  Packed packed;
  const float* q;  // [T, H, D]; query head h reads KV head h / (H / H_kv)
  int64_t q_token_stride;  // elements
  int64_t q_head_stride;
  int64_t heads;  // H, a multiple of H_kv
  float scale;  // of the scores, usually D^-1/2
  bool causal;  // a query at position p sees keys j <= p
  int64_t window;  // and p - window < j; kNoWindow for all
  Query query;
  float* out;  // [T, H, D]; zeros for a query that sees no key
  int64_t out_token_stride;  // elements
  int64_t out_head_stride;
  uint8_t* workspace;  // plan.workspace_bytes, 64-byte aligned, see plan.h; may be null when that is 0

  int64_t group() const { return heads / cache.heads; }  // query heads per KV head
};

}  // namespace tilewright::int4_fp8_attention
