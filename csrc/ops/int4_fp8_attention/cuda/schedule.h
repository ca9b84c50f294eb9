// SPDX-License-Identifier: Apache-2.0
// How the CUDA kernels cut a problem. Pure functions of shapes and of one sequence's own numbers, the same on host and
// device: a query's keys are cut in the same places whatever is packed beside it.
#pragma once

#include "ops/int4_fp8_attention/cuda/problem.h"

namespace tilewright::int4_fp8_attention::cuda {

// Which kernel takes a problem. kPlain takes everything; the others what the fields below say.
enum class Path : uint8_t { kPlain, kDecode, kPrefill };

inline constexpr int kDecodeRows = 8;  // query tokens times heads of a KV head, in one block
inline constexpr int kPrefillRows = 128;
inline constexpr int kPrefillKeys = 64;  // keys of a tile
inline constexpr int kTiledHeadDim = 128;  // of the prefill kernel: above it a row has two scales

// A row of the cache (and of the scales behind it) is read in vectors of this many bytes.
inline constexpr int64_t kVectorBytes = 16;

// Tiles of 128 rows pay from so many rows a sequence on, on average, and when there are enough of them for the device:
// the decode kernel issues 5.4 cycles of a multiprocessor for a key and 8 rows, and may cut along the keys; a block of
// the prefill kernel takes about 1120 for 64 keys and 128 rows, and may not. They meet near 26 rows times KV heads for
// each multiprocessor. Counted from the disassembly, not timed.
inline constexpr int64_t kPrefillFrom = 48;
inline constexpr int64_t kPrefillLoad = 28;

// Long sequences are cut along their keys. The chunk grows with the sequence, so that partial results stay a few percent
// of the cache's bytes: each row of queries leaves 4 (D + 2) bytes a chunk, beside D + 4 bytes a key and KV head. Where
// they would take more memory than this for each multiprocessor, there are rows enough without cutting.
inline constexpr int64_t kMostPartials = int64_t{2} << 20;  // bytes
inline constexpr int kMaxChunks = 32;
inline constexpr int kLeastChunk = 256;
inline constexpr int kChunkStep = 64;

template <class T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T larger(T a, T b) {
  return a > b ? a : b;
}
// Of numbers that the kernels count in: 64-bit division takes a hundred instructions.
constexpr int ceil_of(int a, int b) { return (a + b - 1) / b; }

constexpr int chunk_keys(int keys) {
  return larger(kLeastChunk, ceil_of(ceil_of(keys, kMaxChunks), kChunkStep) * kChunkStep);
}
constexpr int chunks_of(int keys) { return keys <= 0 ? 1 : ceil_of(keys, chunk_keys(keys)); }

// The most that any sequence of the cache can have.
constexpr int most_chunks(int64_t capacity) {
  return capacity >= int64_t{kMaxChunks} * kLeastChunk ? kMaxChunks : chunks_of(static_cast<int>(capacity));
}

// One sequence as the kernels see it. Rows (T H) and the capacity are at most 2^28, and
// items at most 4 T H + 32 S.
struct Sequence {
  int first;  // row of q
  int queries;
  int length;  // -1: it does not fit, outputs are NaN
  int key_begin;  // first key that any query sees, down to a multiple of kChunkStep

  constexpr bool valid() const { return length >= 0; }
  constexpr int keys() const { return length - key_begin; }
};

struct Seen {
  int begin, end;
};

// Keys that query i of the sequence sees.
constexpr Seen seen_by(const Attention& p, const Sequence& s, int i) {
  const int position = s.length - s.queries + i;
  return {p.window > position ? 0 : position - static_cast<int>(p.window) + 1,
          p.causal ? smaller(position + 1, s.length) : s.length};
}

// Whatever the device's memory holds, no index leaves its tensor.
constexpr Sequence sequence_of(const Attention& p, int64_t first, int64_t end, int64_t length) {
  Sequence s{};
  s.first = static_cast<int>(larger<int64_t>(0, smaller(first, p.tokens)));
  s.queries = static_cast<int>(larger<int64_t>(0, smaller(end, p.tokens) - s.first));
  s.length = length >= s.queries && length <= p.cache.capacity ? static_cast<int>(length) : -1;
  s.key_begin = s.length >= 0 ? seen_by(p, s, 0).begin / kChunkStep * kChunkStep : 0;
  return s;
}

// Without memory for partial results nothing is cut.
constexpr int decode_chunks(const Attention& p, const Sequence& s) {
  return s.valid() && p.partials != nullptr ? chunks_of(s.keys()) : 1;
}
constexpr int decode_chunk_keys(const Attention& p, const Sequence& s) {
  return p.partials != nullptr ? chunk_keys(s.keys()) : s.keys();
}

// Blocks of rows over all sequences are at most this many, whatever cu_seqlens says.
constexpr int64_t most_row_blocks(const Attention& p, int64_t rows) {
  return ceil_div(p.tokens * p.group(), rows) + smaller(p.sequences, p.tokens);
}

// Tokens whose rows one block of the prefill kernel holds: whole tokens, all heads of the group.
constexpr int prefill_tokens(const Attention& p) { return kPrefillRows / p.group(); }
constexpr int64_t most_prefill_blocks(const Attention& p) {
  return ceil_div(p.tokens, prefill_tokens(p)) + smaller(p.sequences, p.tokens);
}

// Floats of partial results: for each token, head and chunk D sums, then for each a maximum and a total.
constexpr int64_t workspace_floats(const Attention& p, int multiprocessors) {
  const int64_t chunks = most_chunks(p.cache.capacity);
  const int64_t floats = p.tokens * p.heads * chunks * (p.cache.head_dim + 2);
  return chunks == 1 || 4 * floats > kMostPartials * multiprocessors ? 0 : floats;
}

inline bool in_vectors(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }
inline bool in_vectors(const Strides& s) {
  return s.sequence % kVectorBytes == 0 && s.head % kVectorBytes == 0 && s.token % kVectorBytes == 0;
}

// Rows of whole vectors at aligned addresses, and few enough of them for a lane's registers.
inline bool has_fast_cache(const Cache& c) {
  return (c.head_dim <= kTiledHeadDim || c.format == CacheFormat::kInt4) &&
         row_bytes(c.format, c.head_dim) % kVectorBytes == 0 && in_vectors(c.k) && in_vectors(c.v) &&
         in_vectors(c.data);
}

inline Path path_of(const Attention& p, int multiprocessors) {
  if (!has_fast_cache(p.cache)) return Path::kPlain;
  const bool many =
      p.tokens * p.group() >= kPrefillFrom * p.sequences && p.tokens * p.heads >= kPrefillLoad * multiprocessors;
  const bool tiled = p.cache.format == CacheFormat::kInt4 && p.query == Query::kFp8 && p.group() <= kPrefillRows &&
                     p.cache.head_dim <= kTiledHeadDim;
  return many && tiled ? Path::kPrefill : Path::kDecode;
}

}  // namespace tilewright::int4_fp8_attention::cuda
