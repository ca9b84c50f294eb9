// SPDX-License-Identifier: Apache-2.0
// y^T = W x^T on the matrix units, W in 4 bits as the register operand.
//
// One warpgroup loads: chunks of weights by bulk copies, 128 columns of a tile of tokens by TMA. Two warpgroups multiply:
// each turns the words of its 64 (or 2 x 64) rows into e4m3 bytes in registers, multiplies them by the tokens in shared
// memory, and adds the partial sums of a group, times the group's scale, to its float32 totals. With few tokens both have
// the same 64 rows and every other 128 columns.
#pragma once

#include "hopper/hopper.h"
#include "ops/int4_linear/cuda/launch.h"

namespace tilewright::int4_linear {

using format::Int4Hopper;
using format::OffsetKind;
using format::ScaleType;

// N: tokens of a tile. Blocks: 64-row blocks of a consumer. Fine: scales change within 128 columns.
template <int N, int Blocks, Form F, bool Fine>
struct Config {
  static constexpr int kTokens = N;
  static constexpr int kBlocks = Blocks;
  static constexpr Form kForm = F;
  static constexpr bool kFine = Fine;
  static constexpr int kRegisters = N / 2;  // of one 64 x N accumulator
  static constexpr bool kTurns = takes_turns(N);
  static constexpr int kTileBlocks = tile_blocks(N, Blocks);
  static constexpr int kCluster = cluster_blocks(Blocks);
  static constexpr int kReleases = (kTurns ? 4 : 4 * kConsumers) * kCluster;  // warps that use a stage
  static constexpr int kStagingTokens = N < int4_linear::kStagingTokens ? N : int4_linear::kStagingTokens;
  using Tokens = hopper::Tile<hopper::e4m3, N, Int4Hopper::kCols, hopper::Swizzle::k128>;
  using Product = hopper::Wgmma<hopper::e4m3, hopper::e4m3, N>;
};

struct MatrixParams {
  hopper::TensorMap x;  // codes, boxes of 128 columns by kTokens
  const char* chunks;
  const float* per_tensor_scale;
  const float* x_scales;
  const float* x_sums;  // [k_tiles * subs, sums_stride]
  const void* bias;
  void* y;
  float* pieces;
  int32_t* counters;
  int64_t m, n, sums_stride, piece_floats;
  int chunk_bytes, row_blocks, token_tiles, stages, sub, scale_bytes;
  ScaleType scale_type;
  OffsetKind offset_kind;
  Number bias_type, y_type;
  bool overlap;
  Work work;
};

// The parts of shared memory: stages of tokens, of weights and of sums, the epilogue's staging, the barriers.
template <class C>
struct Shared {
  char* tokens;
  char* weights;
  char* sums;
  float* staging;
  float* scales;  // [kConsumers][kTokens] of the tokens of the tile that is written
  hopper::Barrier* full;
  hopper::Barrier* empty;
  int32_t* joined;  // [kConsumers]: pieces of a tile that were there before this block's
  int weight_bytes, sum_bytes;  // of a stage

  TILEWRIGHT_DEVICE explicit Shared(const MatrixParams& p) {
    weight_bytes = C::kTileBlocks * p.chunk_bytes;
    sum_bytes = C::kForm == Form::kUnsigned ? Int4Hopper::kCols / p.sub * C::kTokens * 4 : 0;
    tokens = hopper::shared_memory();
    weights = tokens + p.stages * C::Tokens::kBytes;
    sums = weights + p.stages * weight_bytes;
    staging = reinterpret_cast<float*>(sums + p.stages * sum_bytes);
    scales = staging + staging_floats(C::kTokens) - kConsumers * C::kTokens;
    full = reinterpret_cast<hopper::Barrier*>(scales + kConsumers * C::kTokens);
    empty = full + kMaxStages;
    joined = reinterpret_cast<int32_t*>(empty + kMaxStages);
  }
  TILEWRIGHT_DEVICE char* tokens_of(int stage) const { return tokens + stage * C::Tokens::kBytes; }
  TILEWRIGHT_DEVICE char* chunk_of(const MatrixParams& p, int stage, int block) const {
    return weights + stage * weight_bytes + block * p.chunk_bytes;
  }
  TILEWRIGHT_DEVICE float* sums_of(int stage) const { return reinterpret_cast<float*>(sums + stage * sum_bytes); }
};

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  TILEWRIGHT_DEVICE void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  TILEWRIGHT_DEVICE void skip(int steps, int stages) {
    stage += steps;
    phase ^= static_cast<uint32_t>(stage / stages) & 1u;
    stage %= stages;
  }
};

// Whose work this block shares: its cluster, and its place there.
template <class C>
TILEWRIGHT_DEVICE int cluster_index() {
  return static_cast<int>(blockIdx.x) / C::kCluster;
}
template <class C>
TILEWRIGHT_DEVICE int rank_in_cluster() {
  return static_cast<int>(blockIdx.x) % C::kCluster;
}
// The first of the 64-row blocks of this block's part of a tile.
template <class C>
TILEWRIGHT_DEVICE int first_row_block(const MatrixParams& p, int tile) {
  return (tile / p.token_tiles * C::kCluster + rank_in_cluster<C>()) * C::kTileBlocks;
}

// A block's 128-column steps one by one.
struct Steps {
  int index = 0, k = -1;
  Segment segment{0, 0, 0};

  TILEWRIGHT_DEVICE bool next(const Work& work, int block) {
    if (++k < segment.last) return true;
    if (!segment_of(work, block, index++, segment)) return false;
    k = segment.first;
    return true;
  }
};

// --- The producer: one thread.

template <class C>
TILEWRIGHT_DEVICE void load_weights(const MatrixParams& p, const Shared<C>& shared, const Steps& at, int stage) {
  const int first = first_row_block<C>(p, at.segment.tile);
  const int blocks = max(0, min(C::kTileBlocks, p.row_blocks - first));
  hopper::Barrier& full = shared.full[stage];
  hopper::arrive_expect(full, static_cast<uint32_t>(blocks * p.chunk_bytes + C::Tokens::kBytes + shared.sum_bytes));
  for (int b = 0; b < blocks; ++b) {
    const int64_t chunk = static_cast<int64_t>(first + b) * p.work.k_tiles + at.k;
    hopper::load_bulk(shared.chunk_of(p, stage, b), p.chunks + chunk * p.chunk_bytes,
                      static_cast<uint32_t>(p.chunk_bytes), full);
  }
}

template <class C>
TILEWRIGHT_DEVICE void load_tokens(const MatrixParams& p, const Shared<C>& shared, const Steps& at, int stage) {
  const int token = at.segment.tile % p.token_tiles * C::kTokens;
  hopper::Barrier& full = shared.full[stage];
  if constexpr (C::kCluster == 1) {
    hopper::load_tile(shared.tokens_of(stage), p.x, full, at.k * Int4Hopper::kCols, token);
  } else {
    constexpr int kPart = C::kTokens / C::kCluster;
    const int first = rank_in_cluster<C>() * kPart;
    hopper::load_tile_multicast(shared.tokens_of(stage) + first * Int4Hopper::kCols, p.x, full, (1 << C::kCluster) - 1,
                                at.k * Int4Hopper::kCols, token + first);
  }
  if constexpr (C::kForm == Form::kUnsigned) {
    const int subs = Int4Hopper::kCols / p.sub;
    for (int s = 0; s < subs; ++s) {
      hopper::load_bulk(shared.sums_of(stage) + s * C::kTokens,
                        p.x_sums + (static_cast<int64_t>(at.k) * subs + s) * p.sums_stride + token, C::kTokens * 4,
                        full);
    }
  }
}

// The weights depend on no other kernel: the first stages of them are on their way before the tokens exist.
template <class C>
TILEWRIGHT_DEVICE void produce(const MatrixParams& p, const Shared<C>& shared) {
  const int block = cluster_index<C>();
  Steps at;
  int ahead = 0;
  while (ahead < p.stages && at.next(p.work, block)) load_weights(p, shared, at, ahead++);
  if (p.overlap) hopper::wait_for_previous_kernel();
  Steps tokens;
  for (int stage = 0; stage < ahead; ++stage) {
    tokens.next(p.work, block);
    load_tokens(p, shared, tokens, stage);
  }
  if (ahead < p.stages) return;
  for (Ring ring; at.next(p.work, block); ring.advance(p.stages)) {
    hopper::wait(shared.empty[ring.stage], ring.phase);
    load_weights(p, shared, at, ring.stage);
    load_tokens(p, shared, at, ring.stage);
  }
}

// --- The consumers.

// A thread's part of a chunk as it lies in memory: words of steps 0, 0, 1, 1, ... of the rows r and r + 8.
struct Words {
  uint32_t word[8];
};

TILEWRIGHT_DEVICE void load_words(Words& words, const char* chunk, int thread) {
  const hopper::U128 low = hopper::load_16(chunk + thread * 16);
  const hopper::U128 high = hopper::load_16(chunk + Int4Hopper::kThreads * 16 + thread * 16);
  words = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

// A number of each of the thread's two rows.
struct Pair {
  float low, high;
};

// Numbers of the rows r and r + 8 of warp w, side by side in row order.
TILEWRIGHT_DEVICE Pair load_pair(const MatrixParams& p, const char* numbers, int thread) {
  const int pair = thread / 32 * 8 + thread % 32 / 4;
  Pair result;
  if (p.scale_type == ScaleType::kFloat32) {
    const auto* at = reinterpret_cast<const float*>(numbers) + pair * 2;
    return {at[0], at[1]};
  }
  const uint32_t word = reinterpret_cast<const uint32_t*>(numbers)[pair];
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
  const char* numbers = chunk + Int4Hopper::kCodeBytes + sub_index * row_of_numbers;
  Scale result{load_pair(p, numbers, thread), {0.0f, 0.0f}};
  if constexpr (C::kForm == Form::kUnsigned) {
    constexpr float kUnit = 1.0f / (1 << Int4Hopper::kExponent);
    Pair zero{static_cast<float>(format::Int4::kSymmetricZero), static_cast<float>(format::Int4::kSymmetricZero)};
    if (p.offset_kind != OffsetKind::kSymmetric) {
      zero = load_pair(p, numbers + Int4Hopper::kCols / p.sub * row_of_numbers, thread);
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

// total += scale * part, in float32: after at most 128 columns, so that the short sums of the matrix unit stay short.
template <class C>
TILEWRIGHT_DEVICE void take_up(float (&total)[C::kRegisters], const float (&part)[C::kRegisters], const Scale& scale,
                               const float* sums, int thread) {
#pragma unroll
  for (int i = 0; i < C::kRegisters; ++i) {
    const bool high = i / 2 % 2 != 0;
    if constexpr (C::kForm == Form::kFold) {
      total[i] += part[i];
    } else {
      total[i] = fmaf(part[i], high ? scale.scale.high : scale.scale.low, total[i]);
    }
    if constexpr (C::kForm == Form::kUnsigned) {
      const float sum = sums[hopper::accumulator_col(thread, i)];
      total[i] = fmaf(sum, high ? scale.offset.high : scale.offset.low, total[i]);
    }
  }
}

// One chunk whose 128 columns share a scale: four steps into one partial sum. next() is called while they are under way.
template <class C, class Next>
TILEWRIGHT_DEVICE void multiply_coarse(const MatrixParams& p, const char* chunk, const char* tokens, const float* sums,
                                       float (&total)[C::kRegisters], Words& words, int thread, const Next& next) {
  float part[C::kRegisters];
  uint32_t a[4][4];
  const Scale scale = load_scale<C>(p, chunk, 0, thread);
  Table tables[2] = {};
  if constexpr (C::kForm == Form::kFold) {
    tables[0] = fold_table(scale.scale.low);
    tables[1] = fold_table(scale.scale.high);
  }
#pragma unroll
  for (int step = 0; step < 4; ++step) decode<C>(a[step], words, step, tables);
#pragma unroll
  for (int step = 0; step < 4; ++step) hopper::keep(a[step]);
  hopper::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    C::Product::run(part, a[step], C::Tokens::k_major(tokens, 0, 32 * step), step != 0);
  }
  hopper::wgmma_commit();
  next();
  hopper::wgmma_wait<0>();
  hopper::keep(part);
  take_up<C>(total, part, scale, sums, thread);
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
    if (lane == 0) hopper::arrive(shared.empty[stage]);
  } else {
    if (lane < C::kCluster) hopper::arrive_cluster(shared.empty[stage], lane);  // whoever writes here waits for all
  }
}

// A segment: the totals of a consumer's blocks over the columns [128 first, 128 last), or over every other 128 of them.
// Of the blocks, `here` exist, at least one; the last of those stands in for one that does not.
template <class C>
TILEWRIGHT_DEVICE void multiply_segment(const MatrixParams& p, const Shared<C>& shared, const Segment& segment,
                                        Ring ring, float (&totals)[C::kBlocks][C::kRegisters], int consumer, int here) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  constexpr int kStep = C::kTurns ? kConsumers : 1;
  const int to_next = here > 1 ? p.chunk_bytes : 0;
  const auto chunk_of = [&](int stage, int b) {
    return shared.chunk_of(p, stage, C::kTurns ? 0 : consumer * C::kBlocks) + b * to_next;
  };
  int k = segment.first;
  if constexpr (C::kTurns) {
    k += consumer;
    if (k >= segment.last) return;
    ring.skip(consumer, p.stages);
  }
  Words words;
  hopper::wait(shared.full[ring.stage], ring.phase);
  load_words(words, chunk_of(ring.stage, 0), thread);
  for (; k < segment.last; k += kStep) {
    Ring ahead = ring;
#pragma unroll
    for (int i = 0; i < kStep; ++i) ahead.advance(p.stages);
    const char* tokens = shared.tokens_of(ring.stage);
    const float* sums = shared.sums_of(ring.stage);
#pragma unroll
    for (int b = 0; b < C::kBlocks; ++b) {
      const auto load_next = [&] {
        if (b + 1 < C::kBlocks) {
          load_words(words, chunk_of(ring.stage, b + 1), thread);
        } else if (k + kStep < segment.last) {
          hopper::wait(shared.full[ahead.stage], ahead.phase);
          load_words(words, chunk_of(ahead.stage, 0), thread);
        }
      };
      if constexpr (C::kFine) {
        multiply_fine<C>(p, chunk_of(ring.stage, b), tokens, sums, totals[b], words, thread);
        load_next();
      } else {
        multiply_coarse<C>(p, chunk_of(ring.stage, b), tokens, sums, totals[b], words, thread, load_next);
      }
    }
    release(shared, ring.stage);
    ring = ahead;
  }
}

// A segment of which this consumer has no rows.
template <class C>
TILEWRIGHT_DEVICE void pass_segment(const MatrixParams& p, const Shared<C>& shared, const Segment& segment, Ring ring) {
  for (int k = segment.first; k < segment.last; ++k) {
    hopper::wait(shared.full[ring.stage], ring.phase);
    release(shared, ring.stage);
    ring.advance(p.stages);
  }
}

}  // namespace tilewright::int4_linear
