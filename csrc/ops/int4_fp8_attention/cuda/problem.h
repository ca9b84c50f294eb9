// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels are given: the cache of problem.h with addresses on the device, and tokens in the type they
// came in. Nothing here is read on the host but shapes: cu_seqlens and lengths stay on the device, and blocks look up
// their sequence themselves.
#pragma once

#include "ops/int4_fp8_attention/problem.h"

namespace tilewright::int4_fp8_attention::cuda {

enum class Element : uint8_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t element_bytes(Element type) { return type == Element::kFloat32 ? 4 : 2; }

// [T, heads, D]; elements of a head are adjacent.
struct Tokens {
  const void* data;
  Element type;
  int64_t token_stride, head_stride;  // elements
};

// A sequence that would outgrow the cache gets nothing, and lengths[s] = -1: the host cannot be told without waiting
// for the device, so the sequence is marked, and its outputs are NaN until it is reset.
struct Append {
  Cache cache;
  int64_t sequences;  // S
  int64_t tokens;  // T, rows of k and v
  const int64_t* cu_seqlens;  // [S+1]
  int64_t* lengths;  // [S], the new tokens not yet included
  Tokens k, v;
};

// A query of a sequence whose lengths[s] does not fit (below its queries, beyond the capacity) gives NaN.
struct Attention {
  Cache cache;
  int64_t sequences;
  int64_t tokens;  // T, rows of q and out
  const int64_t* cu_seqlens;  // [S+1]
  const int64_t* lengths;  // [S]
  Tokens q;
  int64_t heads;  // H, a multiple of H_kv; T H and the capacity are at most 2^28
  float scale;
  bool causal;
  int64_t window;
  Query query;
  void* out;  // [T, H, D], dense, in the type of q; rows past the last offset become zero
  float* partials;  // partials_needed(), null when that is 0

  constexpr int group() const { return static_cast<int>(heads) / static_cast<int>(cache.heads); }
};

}  // namespace tilewright::int4_fp8_attention::cuda
