// SPDX-License-Identifier: Apache-2.0
// What a consumer warpgroup does with a stage: words of weights to register operands, products, sums.
#pragma once

#include "ops/int4_linear/cuda/matrix.cuh"

namespace tilewright::int4_linear {

// A thread's part of a chunk as it lies in memory: words of steps 0, 0, 1, 1, ... of the rows r and r + 8.
struct Words {
  uint32_t word[8];
};

// Where a byte of a chunk is in its slot of shared memory.
TILEWRIGHT_DEVICE uint32_t in_chunk(int offset) {
  return hopper::swizzled<hopper::Swizzle::k128>(static_cast<uint32_t>(offset));
}

TILEWRIGHT_DEVICE void load_words(Words& words, const char* chunk, int thread) {
  const char* at = chunk + in_chunk(thread * 16);
  const hopper::U128 low = hopper::load_16(at);
  const hopper::U128 high = hopper::load_16(at + Int4Hopper::kThreads * 16);  // as many lines on: the same swizzle
  words = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

// A number of each of the thread's two rows.
struct Pair {
  float low, high;
};

// Numbers of the rows r and r + 8 of warp w, side by side in row order.
TILEWRIGHT_DEVICE Pair load_pair(const MatrixParams& p, const char* chunk, int offset, int thread) {
  const int pair = thread / 32 * 8 + thread % 32 / 4;
  Pair result;
  if (p.scale_type == ScaleType::kFloat32) {
    const auto* at = reinterpret_cast<const float*>(chunk + in_chunk(offset + pair * 8));
    return {at[0], at[1]};
  }
  const uint32_t word = *reinterpret_cast<const uint32_t*>(chunk + in_chunk(offset + pair * 4));
  if (p.scale_type == ScaleType::kBFloat16) {
    hopper::unpack_bf16x2(word, result.low, result.high);
  } else {
    hopper::unpack_f16x2(word, result.low, result.high);
  }
  return result;
}

// What turns partial sums of a group into sums of weights times codes, both times 2^-9 as the partial sums are.
struct Scale {
  Pair scale;
  Pair offset;  // times the sum of the codes: the minimum, or minus zero times scale
};

template <class C>
TILEWRIGHT_DEVICE Scale load_scale(const MatrixParams& p, const char* chunk, int sub_index, int thread) {
  const int row_of_numbers = Int4Hopper::kRows * p.scale_bytes;
  const int numbers = Int4Hopper::kCodeBytes + sub_index * row_of_numbers;
  Scale result{load_pair(p, chunk, numbers, thread), {0.0f, 0.0f}};
  if constexpr (C::kForm == Form::kUnsigned) {
    constexpr float kUnit = 1.0f / (1 << Int4Hopper::kExponent);
    Pair zero{static_cast<float>(format::Int4::kSymmetricZero), static_cast<float>(format::Int4::kSymmetricZero)};
    if (p.offset_kind != OffsetKind::kSymmetric) {
      zero = load_pair(p, chunk, numbers + Int4Hopper::kCols / p.sub * row_of_numbers, thread);
    }
    const bool minimum = p.offset_kind == OffsetKind::kMinimum;
    result.offset.low = (minimum ? zero.low : -zero.low * result.scale.low) * kUnit;
    result.offset.high = (minimum ? zero.high : -zero.high * result.scale.high) * kUnit;
  }
  return result;
}

// Fold: e4m3(m * scale) for m = 0..7, a byte each. The sign is put on after the look-up: rounding is symmetric.
struct Table {
  uint32_t low, high;
};

TILEWRIGHT_DEVICE Table fold_table(float scale) {
  return {hopper::pack_e4m3x4(0.0f, scale, 2.0f * scale, 3.0f * scale),
          hopper::pack_e4m3x4(4.0f * scale, 5.0f * scale, 6.0f * scale, 7.0f * scale)};
}

// The e4m3 bytes of the low and of the high nibbles of a signed word, looked up. A selector takes nibbles in order, so
// the look-ups give bytes low 0, high 0, low 1, high 1 and so on, which two more permutations sort.
TILEWRIGHT_DEVICE void look_up(uint32_t word, const Table& table, uint32_t& low, uint32_t& high) {
  const uint32_t selector = word & 0x77777777u;
  const uint32_t first = __byte_perm(table.low, table.high, selector);
  const uint32_t second = __byte_perm(table.low, table.high, selector >> 16);
  low = __byte_perm(first, second, 0x6420u) ^ (Int4Hopper::signed_low(word) & 0x80808080u);
  high = __byte_perm(first, second, 0x7531u) ^ (Int4Hopper::signed_high(word) & 0x80808080u);
}

// The register operand of one step of 32 columns.
template <class C>
TILEWRIGHT_DEVICE void decode(uint32_t (&a)[4], const Words& words, int step, const Table (&tables)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t word = words.word[2 * step + h];
    if constexpr (C::kForm == Form::kSigned) {
      a[h] = Int4Hopper::signed_low(word);
      a[h + 2] = Int4Hopper::signed_high(word);
    } else if constexpr (C::kForm == Form::kUnsigned) {
      a[h] = Int4Hopper::unsigned_low(word);
      a[h + 2] = Int4Hopper::unsigned_high(word);
    } else {
      look_up(word, tables[h], a[h], a[h + 2]);
    }
  }
}

// total += scale * part, in float32: after at most 128 columns, so that the short sums of the matrix unit stay short. The
// part is that of the tokens from place * Count on, two registers for each.
template <class C, int Count>
TILEWRIGHT_DEVICE void add_part(float (&total)[C::kRegisters], const float (&part)[Count], const Pair& scale,
                                int place = 0) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    float& sum = total[place * Count + i];
    if constexpr (C::kForm == Form::kFold) {
      sum += part[i];
    } else {
      sum = fmaf(part[i], i / 2 % 2 != 0 ? scale.high : scale.low, sum);
    }
  }
}

// What the codes of x add up to, times the offsets of unsigned weights.
template <class C>
TILEWRIGHT_DEVICE void add_offsets(float (&total)[C::kRegisters], const Pair& offset, const float* sums, int thread) {
  if constexpr (C::kForm == Form::kUnsigned) {
#pragma unroll
    for (int i = 0; i < C::kRegisters; ++i) {
      total[i] = fmaf(sums[hopper::accumulator_col(thread, i)], i / 2 % 2 != 0 ? offset.high : offset.low, total[i]);
    }
  }
}

template <class C>
TILEWRIGHT_DEVICE void take_up(float (&total)[C::kRegisters], const float (&part)[C::kRegisters], const Scale& scale,
                               const float* sums, int thread) {
  add_part<C>(total, part, scale.scale);
  add_offsets<C>(total, scale.offset, sums, thread);
}

// One product of 32 columns (or of the half of them that the operand leaves) and its scale.
template <class C>
TILEWRIGHT_DEVICE void multiply_step(const char* tokens, int step, uint32_t (&a)[4], const Scale& scale,
                                     const float* sums, float (&total)[C::kRegisters], int thread) {
  float part[C::kRegisters];
  hopper::keep(a);
  hopper::wgmma_fence();
  C::Product::run(part, a, C::Tokens::k_major(tokens, 0, 32 * step), false);
  hopper::wgmma_commit();
  hopper::wgmma_wait<0>();
  hopper::keep(part);
  take_up<C>(total, part, scale, sums, thread);
}

// One chunk with a scale for every 64, 32 or 16 columns: taken up after each 32, with the other half of the operand zero
// where a scale spans 16 only. Sums of codes are those of `sub` columns: with 64, only the first half brings them.
template <class C>
TILEWRIGHT_DEVICE void multiply_fine(const MatrixParams& p, const char* chunk, const char* tokens, const float* sums,
                                     float (&total)[C::kRegisters], const Words& words, int thread) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    for (int half = 0; half < (p.sub == 16 ? 2 : 1); ++half) {
      const int sub_index = (32 * step + 16 * half) / p.sub;
      Scale scale = load_scale<C>(p, chunk, sub_index, thread);
      Table tables[2] = {};
      if constexpr (C::kForm == Form::kFold) {
        tables[0] = fold_table(scale.scale.low);
        tables[1] = fold_table(scale.scale.high);
      }
      uint32_t a[4];
      decode<C>(a, words, step, tables);
      if (p.sub == 16) {
        a[0] = half == 0 ? a[0] : 0;
        a[1] = half == 0 ? a[1] : 0;
        a[2] = half == 0 ? 0 : a[2];
        a[3] = half == 0 ? 0 : a[3];
      }
      if (p.sub == 64 && step % 2 == 1) scale.offset = {0.0f, 0.0f};
      multiply_step<C>(tokens, step, a, scale, sums + sub_index * C::kTokens, total, thread);
    }
  }
}

// A warp is done with a stage.
template <class C>
TILEWRIGHT_DEVICE void release(const Shared<C>& shared, int stage) {
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (C::kCluster == 1) {
    if (lane == 0) hopper::arrive(shared.empty(stage));
  } else {
    if (lane < C::kCluster) hopper::arrive_cluster(shared.empty(stage), lane);  // whoever writes here waits for all
  }
}

// --- Many tokens: each consumer has rows of its own.
//
// Products are issued a piece at a time: 64 rows by half of the tile's tokens, four instructions. A piece is on its way while
// the sums of the one before are added up and the next words decoded. Only between two chunks does a consumer leave the
// matrix unit alone, to the other one: the compiler does not follow products that are under way around a loop.

// The register operands of 128 columns, from words and (fold) the scale.
template <class C>
TILEWRIGHT_DEVICE void decode_chunk(uint32_t (&a)[4][4], const Words& words, const Scale& scale) {
  Table tables[2] = {};
  if constexpr (C::kForm == Form::kFold) {
    tables[0] = fold_table(scale.scale.low);
    tables[1] = fold_table(scale.scale.high);
  }
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    decode<C>(a[step], words, step, tables);
    hopper::keep(a[step]);
  }
}

// A block of a chunk by the tokens [kPieceTokens half, kPieceTokens (half + 1)).
template <class C>
TILEWRIGHT_DEVICE void issue_piece(float (&part)[C::kPieceRegisters], uint32_t (&a)[4][4], const char* tokens,
                                   int half) {
  const hopper::Descriptor first = C::Tokens::k_major(tokens, C::kPieceTokens * half, 0);
  hopper::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) C::Piece::run(part, a[step], first.advanced(32 * step), step != 0);
  hopper::wgmma_commit();
}

// What a consumer holds while it walks along K: operands and scales of its blocks, and partial sums of two pieces.
template <class C>
struct Walk {
  uint32_t a[C::kBlocks][4][4];
  Scale scale[C::kBlocks];
  float part[2][C::kPieceRegisters];
};

// One chunk. Block 0's operands are there, and at the end those of the chunk in stage `ahead`. Of the blocks, `here` exist;
// the last of those stands in for one that does not.
template <class C>
TILEWRIGHT_DEVICE void multiply_chunk(const MatrixParams& p, const Shared<C>& shared, const Ring& ring,
                                      const Ring& ahead, Walk<C>& walk, int consumer, int here,
                                      float (&totals)[C::kBlocks][C::kRegisters]) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const char* tokens = shared.tokens_of(ring.stage);
  issue_piece<C>(walk.part[0], walk.a[0], tokens, 0);
#pragma unroll
  for (int b = 0; b < C::kBlocks; ++b) {
    const bool last = b + 1 == C::kBlocks;
    const int next = last ? 0 : b + 1;
    issue_piece<C>(walk.part[1], walk.a[b], tokens, 1);
    add_offsets<C>(totals[b], walk.scale[b].offset, shared.sums_of(ring.stage), thread);
    if (last) hopper::wait(shared.full(ahead.stage), ahead.phase);
    hopper::wgmma_wait<1>();
    hopper::keep(walk.part[0]);
    Words words;  // not before: until here all registers are taken
    const Pair scale = walk.scale[b].scale;
    const char* chunk =
        shared.chunk_of(p, last ? ahead.stage : ring.stage, consumer * C::kBlocks + min(next, here - 1));
    load_words(words, chunk, thread);
    walk.scale[next] = load_scale<C>(p, chunk, 0, thread);
    add_part<C>(totals[b], walk.part[0], scale, 0);
    if (next != b) decode_chunk<C>(walk.a[next], words, walk.scale[next]);
    if (last) {
      hopper::wgmma_wait<0>();
    } else {
      issue_piece<C>(walk.part[0], walk.a[next], tokens, 0);
      hopper::wgmma_wait<1>();
    }
    hopper::keep(walk.part[1]);
#pragma unroll
    for (int step = 0; step < 4; ++step) hopper::keep(walk.a[b][step]);  // read until here
    if (next == b) decode_chunk<C>(walk.a[next], words, walk.scale[next]);
    add_part<C>(totals[b], walk.part[1], scale, 1);
  }
}

// A segment of weights whose 128 columns share a scale: the totals of a consumer's blocks over the columns
// [128 first, 128 last). What is issued and waited for depends on no condition, or the compiler would wait for everything
// everywhere: the last chunk is followed by its own words once more.
template <class C>
TILEWRIGHT_DEVICE void multiply_rows(const MatrixParams& p, const Shared<C>& shared, const Segment& segment, Ring ring,
                                     float (&totals)[C::kBlocks][C::kRegisters], int consumer, int here) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  Walk<C> walk;
  Words words;
  hopper::wait(shared.full(ring.stage), ring.phase);
  const char* chunk = shared.chunk_of(p, ring.stage, consumer * C::kBlocks);
  load_words(words, chunk, thread);
  walk.scale[0] = load_scale<C>(p, chunk, 0, thread);
  decode_chunk<C>(walk.a[0], words, walk.scale[0]);
#pragma unroll 1
  for (int left = segment.last - segment.first; left > 0; --left) {
    Ring ahead = ring;
    if (left > 1) ahead.advance(p.stages);
    multiply_chunk<C>(p, shared, ring, ahead, walk, consumer, here, totals);
    release(shared, ring.stage);
    ring = ahead;
  }
}

// The same where scales change within 128 columns.
template <class C>
TILEWRIGHT_DEVICE void multiply_fine_rows(const MatrixParams& p, const Shared<C>& shared, const Segment& segment,
                                          Ring ring, float (&total)[C::kRegisters], int consumer) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  for (int k = segment.first; k < segment.last; ++k, ring.advance(p.stages)) {
    Words words;
    hopper::wait(shared.full(ring.stage), ring.phase);
    const char* chunk = shared.chunk_of(p, ring.stage, consumer);
    load_words(words, chunk, thread);
    multiply_fine<C>(p, chunk, shared.tokens_of(ring.stage), shared.sums_of(ring.stage), total, words, thread);
    release(shared, ring.stage);
  }
}

// A segment of which this consumer has no rows.
template <class C>
TILEWRIGHT_DEVICE void pass_segment(const MatrixParams& p, const Shared<C>& shared, const Segment& segment, Ring ring) {
  for (int k = segment.first; k < segment.last; ++k) {
    hopper::wait(shared.full(ring.stage), ring.phase);
    release(shared, ring.stage);
    ring.advance(p.stages);
  }
}

// --- Taking turns: few tokens, so that the way through a chunk is long and its work short. Several chunks go it together.

// The partial sums of chunk J of a batch, and then those of the next ones, in order.
template <class C, int Count, int J = 0>
TILEWRIGHT_DEVICE void take_up_batch(float (&total)[C::kRegisters], float (&parts)[Count][C::kRegisters],
                                     const Scale (&scales)[Count], const float* const (&sums)[Count], int thread) {
  hopper::wgmma_wait<Count - 1 - J>();
  hopper::keep(parts[J]);
  take_up<C>(total, parts[J], scales[J], sums[J], thread);
  if constexpr (J + 1 < Count) take_up_batch<C, Count, J + 1>(total, parts, scales, sums, thread);
}

// Chunks [k, k + Count), whose stages start at ring.
template <class C, int Count>
TILEWRIGHT_DEVICE void multiply_batch(const MatrixParams& p, const Shared<C>& shared, const Ring& ring, int k,
                                      float (&total)[C::kRegisters], int thread) {
  Words words[Count];
  Scale scales[Count];
  const float* sums[Count];
  uint32_t a[Count][4][4];
  float parts[Count][C::kRegisters];
  Ring at = ring;
#pragma unroll
  for (int j = 0; j < Count; ++j, at.advance(p.stages)) {
    hopper::wait(shared.full(at.stage), at.phase);
    load_words(words[j], shared.chunk_of(p, at.stage, 0), thread);
    scales[j] = load_scale<C>(p, shared.chunk_of(p, at.stage, 0), 0, thread);
    sums[j] = shared.sums_of(at.stage);
  }
#pragma unroll
  for (int j = 0; j < Count; ++j) decode_chunk<C>(a[j], words[j], scales[j]);
  hopper::wgmma_fence();
  at = ring;
#pragma unroll
  for (int j = 0; j < Count; ++j, at.advance(p.stages)) {
    const hopper::Descriptor tokens = C::Tokens::k_major(shared.tokens_of(at.stage), 0, 0);
#pragma unroll
    for (int step = 0; step < 4; ++step) C::Product::run(parts[j], a[j][step], tokens.advanced(32 * step), step != 0);
    hopper::wgmma_commit();
  }
  take_up_batch<C, Count>(total, parts, scales, sums, thread);
  at = ring;
#pragma unroll
  for (int j = 0; j < Count; ++j, at.advance(p.stages)) release(shared, at.stage);
}

template <class C>
TILEWRIGHT_DEVICE void multiply_one(const MatrixParams& p, const Shared<C>& shared, const Ring& ring, int k,
                                    float (&total)[C::kRegisters], int thread) {
  if constexpr (C::kFine) {
    Words words;
    hopper::wait(shared.full(ring.stage), ring.phase);
    load_words(words, shared.chunk_of(p, ring.stage, 0), thread);
    multiply_fine<C>(p, shared.chunk_of(p, ring.stage, 0), shared.tokens_of(ring.stage), shared.sums_of(ring.stage),
                     total, words, thread);
    release(shared, ring.stage);
  } else {
    multiply_batch<C, 1>(p, shared, ring, k, total, thread);
  }
}

// A stage that is the other consumer's. It is waited for all the same: a barrier tells two neighbouring phases apart, no more.
template <class C>
TILEWRIGHT_DEVICE void let_pass(const MatrixParams& p, const Shared<C>& shared, Ring at, int count) {
  for (int j = 0; j < count; ++j, at.advance(p.stages)) {
    hopper::wait(shared.full(at.stage), at.phase);
    release(shared, at.stage);
  }
}

// Every other batch of a segment, and of the chunks behind the last whole batch every other one.
template <class C>
TILEWRIGHT_DEVICE void multiply_turns(const MatrixParams& p, const Shared<C>& shared, const Segment& segment, Ring ring,
                                      float (&total)[C::kRegisters], int consumer) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  constexpr int kCount = C::kBatch;
  const int batches = (segment.last - segment.first) / kCount;
  int k = segment.first;
  for (int batch = 0; batch < batches; ++batch) {
    if (batch % kConsumers != consumer) {
      let_pass(p, shared, ring, kCount);
    } else if constexpr (kCount == 1) {
      multiply_one<C>(p, shared, ring, k, total, thread);
    } else {
      multiply_batch<C, kCount>(p, shared, ring, k, total, thread);
    }
    ring.hop(kCount, p.stages);
    k += kCount;
  }
  for (int turn = batches; k < segment.last; ++k, ++turn) {
    if (turn % kConsumers != consumer) {
      let_pass(p, shared, ring, 1);
    } else {
      multiply_one<C>(p, shared, ring, k, total, thread);
    }
    ring.advance(p.stages);
  }
}

}  // namespace tilewright::int4_linear
