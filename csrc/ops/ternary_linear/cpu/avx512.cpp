// SPDX-License-Identifier: Apache-2.0
// AVX-512. q2: codes are the unsigned operand of vpdpbusd, a 32-bit lane is a row, so there are no horizontal sums. t3w: a
// table of 27 entries is one register and vpermw reads only the low five bits of each lane, so an index needs no mask.
#include "isa/vec_avx512.h"
#include "ops/ternary_linear/cpu/vector_common.h"

namespace tilewright::ternary_linear::avx512 {
namespace {

using format::TernaryT3w;

constexpr int kTokens = 5;  // 20 accumulators, 4 tiles of weights and their codes: 6 tokens spill
constexpr int kTiles = TernaryQ2::kTilesPerBlock;

template <int kPlane>
inline __attribute__((always_inline)) __m512i codes_of(__m512i raw) {
  const __m512i digit = _mm512_set1_epi8(format::Ternary2::kInvalidDigit);
  if constexpr (kPlane == 0) return _mm512_and_si512(raw, digit);
  return _mm512_and_si512(_mm512_srli_epi16(raw, 2 * kPlane), digit);
}

// Every other plane of few tokens goes to a second set of sums, for the latency of the dot product.
template <int kPlane, int kCount, int kSets>
inline __attribute__((always_inline)) void add_plane(const __m512i (&raw)[kTiles], const int8_t* x, int64_t stride,
                                                     __m512i (&acc)[kSets][kCount][kTiles]) {
  __m512i codes[kTiles];
#pragma GCC unroll 4
  for (int i = 0; i < kTiles; ++i) codes[i] = codes_of<kPlane>(raw[i]);
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t) {
    const __m512i word = _mm512_set1_epi32(four_codes(x + t * stride + kPlane * TernaryQ2::kColsPerPlane));
#pragma GCC unroll 4
    for (int i = 0; i < kTiles; ++i) {
      acc[kPlane % kSets][t][i] = _mm512_dpbusd_epi32(acc[kPlane % kSets][t][i], codes[i], word);
    }
  }
}

inline void store_rows(int32_t* at, __m512i v, int64_t rows) {
  Vec16::store_first(reinterpret_cast<float*>(at), Vec16::from_bits(v), rows);
}

template <int kCount>
void q2_tile(const Problem& p, int64_t m, int64_t block) {
  constexpr int kSets = kCount <= 2 ? 2 : 1;
  const int64_t steps = TernaryQ2::steps(p.weight.k);
  const uint8_t* weight = p.weight.payload + block * steps * TernaryQ2::kBytesPerStep;
  const int8_t* x = p.x + m * p.x_stride;
  __m512i acc[kSets][kCount][kTiles];
  for (int t = 0; t < kCount; ++t) {
    for (int i = 0; i < kTiles; ++i) {
      acc[0][t][i] = _mm512_set1_epi32(-p.sums[m + t]);
      if constexpr (kSets == 2) acc[1][t][i] = _mm512_setzero_si512();
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    const uint8_t* at = weight + s * TernaryQ2::kBytesPerStep;
    const int8_t* columns = x + s * TernaryQ2::kColsPerStep;
    __m512i raw[kTiles];
#pragma GCC unroll 4
    for (int i = 0; i < kTiles; ++i) {
      if constexpr (kCount <= 2) prefetch(at + kPrefetchBytes + i * TernaryQ2::kBytesPerTile);
      raw[i] = _mm512_loadu_si512(at + i * TernaryQ2::kBytesPerTile);
    }
    add_plane<0>(raw, columns, p.x_stride, acc);
    add_plane<1>(raw, columns, p.x_stride, acc);
    add_plane<2>(raw, columns, p.x_stride, acc);
    add_plane<3>(raw, columns, p.x_stride, acc);
  }
  for (int t = 0; t < kCount; ++t) {
    for (int i = 0; i < kTiles; ++i) {
      const int64_t row = block * TernaryQ2::kRowsPerBlock + i * TernaryQ2::kRowsPerTile;
      if (row >= p.weight.n) break;
      const __m512i sum = kSets == 2 ? _mm512_add_epi32(acc[0][t][i], acc[kSets - 1][t][i]) : acc[0][t][i];
      store_rows(p.acc + (m + t) * p.acc_stride + row, sum, p.weight.n - row);
    }
  }
}

// Of one token each plane has sums of its own, so its codes stay where they are in the byte, worth 4^plane, and the sums
// are shifted once at the end. A plane has K / 4 columns of codes up to 3: 64 * 3 * 128 * K / 4 fits for K up to 2^18.
constexpr int64_t kMostColsInPlace = int64_t{1} << 18;
static_assert(64 * 3 * 128 * (kMostColsInPlace / TernaryQ2::kPlanes) <= INT32_MAX);

template <int kPlane>
inline __attribute__((always_inline)) void add_plane_in_place(const __m512i (&raw)[kTiles], const int8_t* x,
                                                              __m512i (&acc)[TernaryQ2::kPlanes][kTiles]) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(format::Ternary2::kInvalidDigit << 2 * kPlane));
  const __m512i word = _mm512_set1_epi32(four_codes(x + kPlane * TernaryQ2::kColsPerPlane));
#pragma GCC unroll 4
  for (int i = 0; i < kTiles; ++i) {
    // The intrinsic lets GCC copy sixteen accumulators in every step; an operand that is read and written does not.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc[kPlane][i]) : "v"(_mm512_and_si512(raw[i], mask)), "v"(word));
  }
}

void q2_token(const Problem& p, int64_t block) {
  const int64_t steps = TernaryQ2::steps(p.weight.k);
  const uint8_t* weight = p.weight.payload + block * steps * TernaryQ2::kBytesPerStep;
  __m512i acc[TernaryQ2::kPlanes][kTiles];
#pragma GCC unroll 16
  for (int i = 0; i < TernaryQ2::kPlanes * kTiles; ++i) acc[i / kTiles][i % kTiles] = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps; ++s) {
    const uint8_t* at = weight + s * TernaryQ2::kBytesPerStep;
    const int8_t* columns = p.x + s * TernaryQ2::kColsPerStep;
    __m512i raw[kTiles];
#pragma GCC unroll 4
    for (int i = 0; i < kTiles; ++i) {
      prefetch(at + kPrefetchBytes + i * TernaryQ2::kBytesPerTile);
      raw[i] = _mm512_loadu_si512(at + i * TernaryQ2::kBytesPerTile);
    }
    add_plane_in_place<0>(raw, columns, acc);
    add_plane_in_place<1>(raw, columns, acc);
    add_plane_in_place<2>(raw, columns, acc);
    add_plane_in_place<3>(raw, columns, acc);
  }
  // All sums before the first branch, so that they stay in registers.
  const __m512i codes_sum = _mm512_set1_epi32(p.sums[0]);
  __m512i sums[kTiles];
#pragma GCC unroll 4
  for (int i = 0; i < kTiles; ++i) {
    const __m512i low = _mm512_add_epi32(acc[0][i], _mm512_srai_epi32(acc[1][i], 2));
    const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(acc[2][i], 4), _mm512_srai_epi32(acc[3][i], 6));
    sums[i] = _mm512_sub_epi32(_mm512_add_epi32(low, high), codes_sum);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTiles; ++i) {
    const int64_t row = block * TernaryQ2::kRowsPerBlock + i * TernaryQ2::kRowsPerTile;
    if (row < p.weight.n) store_rows(p.acc + row, sums[i], p.weight.n - row);
  }
}

// An entry is at most 3 * 128 = 384 in magnitude and a word adds three: 28 words are 84 * 384 = 32256.
constexpr int64_t kWordsPerWiden = 28;
static_assert(kWordsPerWiden * TernaryT3w::kIndices * 3 * 128 <= INT16_MAX, "widen earlier");

constexpr int kMaxBlocks = 4;  // that share a table load
constexpr int kVectors = TernaryT3w::kRowsPerBlock / TernaryT3w::kRowsPerVector;

// 32 rows, held as 16 even and 16 odd ones.
struct Wide {
  __m512i even, odd;
};

inline void widen(Wide& wide, __m512i narrow) {
  wide.even = _mm512_add_epi32(wide.even, _mm512_srai_epi32(_mm512_slli_epi32(narrow, 16), 16));
  wide.odd = _mm512_add_epi32(wide.odd, _mm512_srai_epi32(narrow, 16));
}

void store_wide(const Problem& p, int64_t m, int64_t row, const Wide& wide) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  int32_t* at = p.acc + m * p.acc_stride + row;
  const int64_t rows = p.weight.n - row;
  if (rows > 0) store_rows(at, _mm512_permutex2var_epi32(wide.even, low, wide.odd), rows);
  if (rows > 16) store_rows(at + 16, _mm512_permutex2var_epi32(wide.even, high, wide.odd), rows - 16);
}

// kBlocks blocks of 64 rows by one token.
template <int kBlocks>
void t3w_tile(const Problem& p, int64_t m, int64_t block) {
  constexpr int kAll = kBlocks * kVectors;
  const int64_t words = TernaryT3w::words(p.weight.k);
  const int64_t block_bytes = TernaryT3w::block_bytes(p.weight.k);
  const uint8_t* weight = p.weight.payload + block * block_bytes;
  const int16_t* tables = p.tables + m * table_entries(p.weight.k);
  Wide wide[kAll];
  for (auto& w : wide) w = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t begin = 0; begin < words; begin += kWordsPerWiden) {
    const int64_t end = std::min(words, begin + kWordsPerWiden);
    __m512i narrow[kAll];
#pragma GCC unroll 8
    for (int v = 0; v < kAll; ++v) narrow[v] = _mm512_setzero_si512();
    for (int64_t w = begin; w < end; ++w) {
      const int16_t* table = tables + w * TernaryT3w::kIndices * kTableEntries;
      const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + kTableEntries);
      const __m512i t2 = _mm512_loadu_si512(table + 2 * kTableEntries);
#pragma GCC unroll 8
      for (int v = 0; v < kAll; ++v) {
        const __m512i index = _mm512_loadu_si512(weight + v / kVectors * block_bytes +
                                                 w * TernaryT3w::kBytesPerWordGroup + v % kVectors * 64);
        const __m512i first = _mm512_permutexvar_epi16(index, t0);
        const __m512i second = _mm512_permutexvar_epi16(_mm512_srli_epi16(index, TernaryT3w::kBitsPerIndex), t1);
        const __m512i third = _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 2 * TernaryT3w::kBitsPerIndex), t2);
        narrow[v] = _mm512_add_epi16(_mm512_add_epi16(narrow[v], first), _mm512_add_epi16(second, third));
      }
    }
    for (int v = 0; v < kAll; ++v) widen(wide[v], narrow[v]);
  }
  for (int v = 0; v < kAll; ++v) {
    store_wide(p, m, block * TernaryT3w::kRowsPerBlock + v * TernaryT3w::kRowsPerVector, wide[v]);
  }
}

// Entry i of a table is a0 (i % 3 - 1) + a1 (i / 3 % 3 - 1) + a2 (i / 9 - 1); the last five are never read.
struct Digits {
  int16_t of[TernaryT3w::kColsPerIndex][kTableEntries];
};
constexpr Digits make_digits() {
  Digits digits{};
  for (int i = 0; i < TernaryT3w::kEntries; ++i) {
    for (int c = 0; c < TernaryT3w::kColsPerIndex; ++c) {
      digits.of[c][i] = static_cast<int16_t>(TernaryT3w::digit(static_cast<uint16_t>(i), c) - 1);
    }
  }
  return digits;
}
constexpr Digits kDigits = make_digits();

inline __m512i table_of(const int8_t* codes) {
  const auto term = [&](int c) {
    return _mm512_mullo_epi16(_mm512_loadu_si512(kDigits.of[c]), _mm512_set1_epi16(codes[c]));
  };
  return _mm512_add_epi16(_mm512_add_epi16(term(0), term(1)), term(2));
}

}  // namespace

void q2_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  const int64_t blocks = plan.rows_per_item / TernaryQ2::kRowsPerBlock;
  const int64_t end = std::min(ceil_div(p.weight.n, TernaryQ2::kRowsPerBlock), last * blocks);
  const bool alone = p.m == 1 && p.weight.k <= kMostColsInPlace;
  for (int64_t b = first * blocks; b < end; ++b) {
    if (alone) {
      q2_token(p, b);
      continue;
    }
    each_token_tile<kTokens>(p.m, [&](int64_t m, auto count) { q2_tile<count.value>(p, m, b); });
  }
}

void t3w_items(const Problem& p, const Plan& plan, int64_t first, int64_t last) {
  const int64_t blocks = plan.rows_per_item / TernaryT3w::kRowsPerBlock;
  const int64_t end = std::min(ceil_div(p.weight.n, TernaryT3w::kRowsPerBlock), last * blocks);
  for (int64_t m = 0; m < p.m; ++m) {
    each_token_tile<kMaxBlocks>(end - first * blocks,
                                [&](int64_t b, auto count) { t3w_tile<count.value>(p, m, first * blocks + b); });
  }
}

void build_tables(const int8_t* codes, int64_t k, int16_t* tables) {
  const int64_t whole = k / TernaryT3w::kColsPerIndex;
  for (int64_t i = 0; i < whole; ++i) {
    _mm512_storeu_si512(tables + i * kTableEntries, table_of(codes + i * TernaryT3w::kColsPerIndex));
  }
  // Columns past K: activation zero.
  int8_t rest[TernaryT3w::kColsPerIndex] = {};
  std::memcpy(rest, codes + whole * TernaryT3w::kColsPerIndex,
              static_cast<size_t>(k - whole * TernaryT3w::kColsPerIndex));
  for (int64_t i = whole; i < TernaryT3w::words(k) * TernaryT3w::kIndices; ++i) {
    _mm512_storeu_si512(tables + i * kTableEntries, table_of(rest));
    std::memset(rest, 0, sizeof(rest));
  }
}

void quantize(const float* x, int64_t k, int8_t* codes, float* scale, int32_t* sum) {
  vector_quantize<Vec16>(x, k, codes, scale, sum);
}

// In 32 bits throughout: |sum| <= 128 K.
int32_t sum(const int8_t* codes, int64_t count) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += kColsPerStep) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    total = _mm512_dpbusd_epi32(total, ones, _mm512_zextsi128_si512(bytes));
  }
  return Vec16::reduce_addi(total);
}

void finish(const Epilogue& e, int64_t first, int64_t last) { vector_finish<Vec16>(e, first, last); }

}  // namespace tilewright::ternary_linear::avx512
