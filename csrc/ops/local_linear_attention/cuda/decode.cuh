// SPDX-License-Identifier: Apache-2.0
// Few queries over a long cache. A cluster of 8 blocks takes up to `Rows` rows of one key head; each block walks over an
// eighth of the keys. Lanes share a key: 16 elements each, in registers, where they serve the product with the row's vector
// and the sum that it weighs. Each key is read once a walk:
//
//   first       scores (kept, 4 bytes a key and row), peak, omega, kbar by running maxima
//   iteration   sum_j w_j (k_j - kbar).p k_j
//   last        keys for the tilt, and values
//
// Blocks exchange partial sums through global memory and a cluster barrier, then all go through the same steps of conjugate
// gradients in the same order: they need no one to decide, and the bits do not depend on who comes first. All arithmetic is
// float32.
#pragma once

#include "ops/local_linear_attention/cuda/sequences.cuh"

namespace tilewright::local_linear_attention::cuda {

inline constexpr int kDecodeThreads = 256, kDecodeWarps = kDecodeThreads / 32, kDecodeCluster = 8;
inline constexpr int kOwnElements = 16;  // of a key, a lane
inline constexpr int kMostDecodeSize = 32 * kOwnElements;

template <class T>
struct DecodeParams {
  Shape shape;
  Options options;
  Sequences sequences;
  const T *q, *k, *v;
  const float *ridge, *start;  // start: null, or where the iterations begin
  T* o;
  float *x, *rows;
  int32_t* iterations;
  float* scores;  // [N * HQ, S]
  float* partials;  // [clusters, 2, kDecodeCluster, rows, width + 2]
  int width;  // the larger of K and V
  int lanes;  // that share a key: a power of 2
  int64_t chunks;  // of rows of a key head
};

// What a thread reads of a row of a tensor: 16-byte pieces, those of the lanes side by side.
template <class T>
struct Pieces {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
  static constexpr int kCount = kOwnElements / kWidth;
  hopper::U128 words[kCount];

  // First element of piece i.
  static TILEWRIGHT_DEVICE int element(int i, int lane, int lanes) { return (i * lanes + lane) * kWidth; }

  TILEWRIGHT_DEVICE void load(const T* row, int size, int lane, int lanes) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int d = element(i, lane, lanes);
      words[i] = d < size ? hopper::load_16(row + d) : hopper::U128{0, 0, 0, 0};
    }
  }
  TILEWRIGHT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i] = hopper::U128{0, 0, 0, 0};
  }
  TILEWRIGHT_DEVICE void unpack(float (&values)[kOwnElements]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t four[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 2) {
          hopper::unpack_pair<T>(four[w], values[i * 8 + w * 2], values[i * 8 + w * 2 + 1]);
        } else {
          values[i * 4 + w] = hopper::bits_float(four[w]);
        }
      }
    }
  }
};

// Shared memory of a block, floats.
template <int Rows>
struct DecodeMemory {
  Range* seen;  // [Rows], keys
  int64_t* at;  // [Rows], index into [N, HQ]; -1: none
  float *direction, *x, *left, *mean, *right;  // [Rows, K]
  float* sums;  // [Rows, width + 2]: of the cluster
  float* warps;  // [kDecodeWarps, Rows, width + 2]
  float* numbers;  // [Rows, kNumbers]
  static constexpr int kPeak = 0, kOmega = 1, kInverse = 2, kLambda = 3, kShift = 4, kSquare = 5, kLimit = 6,
                       kCount = 7, kActive = 8, kSpoilt = 9, kNumbers = 10;
  static constexpr int kPlaces = 3 * sizeof(int64_t) / sizeof(float);  // at and seen of a row

  static TILEWRIGHT_BOTH int floats(int key_size, int width) {
    return Rows * (kPlaces + 5 * key_size + (kDecodeWarps + 1) * (width + 2) + kNumbers);
  }
  TILEWRIGHT_DEVICE DecodeMemory(int key_size, int width) {
    seen = reinterpret_cast<Range*>(hopper::shared_memory());
    at = reinterpret_cast<int64_t*>(seen + Rows);
    direction = reinterpret_cast<float*>(at + Rows);
    x = direction + Rows * key_size;
    left = x + Rows * key_size;
    mean = left + Rows * key_size;
    right = mean + Rows * key_size;
    sums = right + Rows * key_size;
    warps = sums + Rows * (width + 2);
    numbers = warps + kDecodeWarps * Rows * (width + 2);
  }
  TILEWRIGHT_DEVICE float& number(int row, int which) const { return numbers[row * kNumbers + which]; }
};

template <class T, int Rows>
struct Decoder {
  const DecodeParams<T>& p;
  DecodeMemory<Rows> m;
  int key_size, value_size;
  int rank, lane, group, groups;  // block of the cluster; lane of those that share a key; which of the block's groups
  int64_t begin, end;  // keys of the block
  const T *keys, *values;  // of the head
  int64_t key_step, value_step;
  float* partials;  // of the cluster
  int parity;

  TILEWRIGHT_DEVICE bool sees(int row, int64_t key) const { return m.seen[row].begin <= key && key < m.seen[row].end; }
  TILEWRIGHT_DEVICE float* scores(int row) const { return p.scores + m.at[row] * p.sequences.keys; }
  TILEWRIGHT_DEVICE float group_sum(float x) const {
    for (int offset = p.lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  }
  // Over the groups of a warp.
  TILEWRIGHT_DEVICE float across_groups(float x) const {
    for (int offset = 16; offset >= p.lanes; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  }
  TILEWRIGHT_DEVICE void take(const float* from, int size, float (&own)[Rows][kOwnElements]) const {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int e = 0; e < kOwnElements; ++e) {
        const int d = Pieces<T>::element(e / Pieces<T>::kWidth, lane, p.lanes) + e % Pieces<T>::kWidth;
        own[r][e] = d < size ? from[r * size + d] : 0.0f;
      }
    }
  }
};

TILEWRIGHT_DEVICE float sum_of_warp(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// A batch of the thread's rows of keys or values; rows behind the end are zero.
template <class T, int Rows, int Batch>
TILEWRIGHT_DEVICE void load_batch(const Decoder<T, Rows>& c, const T* from, int64_t step, int size, int64_t first,
                                  Pieces<T> (&pieces)[Batch]) {
#pragma unroll
  for (int b = 0; b < Batch; ++b) {
    const int64_t key = first + b * c.groups;
    if (key < c.end) {
      pieces[b].load(from + key * step, size, c.lane, c.p.lanes);
    } else {
      pieces[b].clear();
    }
  }
}

// What a walk wants of a key beside its elements.
struct Wanted {
  bool scores, values;
};

// For each of the thread's keys: work(key, its elements, those of its value, the rows' scores), a batch under way at a time.
// The last call of a thread may be for a key behind the end, whose elements are zero: lanes stay together. The score of a key
// that a row does not see is -infinity.
template <Wanted W, class T, int Rows, class Work>
TILEWRIGHT_DEVICE void walk_cache(const Decoder<T, Rows>& c, const Work& work) {
  constexpr int kBatch = (sizeof(T) == 2 ? 4 : 2) / (Rows == 1 ? 1 : 2);
  for (int64_t first = c.begin + c.group; first - c.group < c.end; first += kBatch * c.groups) {
    Pieces<T> keys[kBatch], values[kBatch];
    float scores[kBatch][Rows];
    load_batch(c, c.keys, c.key_step, c.key_size, first, keys);
    if constexpr (W.values) load_batch(c, c.values, c.value_step, c.value_size, first, values);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const int64_t key = first + b * c.groups;
        scores[b][r] = hopper::bits_float(0xff800000u);
        if constexpr (W.scores) {
          if (key < c.end && c.sees(r, key)) scores[b][r] = c.scores(r)[key];
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float elements[kOwnElements], value[kOwnElements];
      keys[b].unpack(elements);
      if constexpr (W.values) values[b].unpack(value);
      work(first + b * c.groups, elements, value, scores[b]);
    }
  }
}

// The groups' sums of `size` elements and of a number a row, over block and cluster, into m.sums: [Rows, size + 2]. The number
// is the same in all lanes of a group. What a block sums is relative to 2^peak of the row; the largest one comes last.
template <class T, int Rows>
TILEWRIGHT_DEVICE void exchange(Decoder<T, Rows>& c, const float (&own)[Rows][kOwnElements],
                                const float (&number)[Rows], const float (&peak)[Rows], int size) {
  const int row_floats = c.p.width + 2, thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    float* to = c.m.warps + (warp * Rows + r) * row_floats;
    const float total = c.across_groups(number[r]);
#pragma unroll
    for (int e = 0; e < kOwnElements; ++e) {
      const float sum = c.across_groups(own[r][e]);
      const int d = Pieces<T>::element(e / Pieces<T>::kWidth, c.lane, c.p.lanes) + e % Pieces<T>::kWidth;
      if (thread % 32 < c.p.lanes && d < size) to[d] = sum;
    }
    if (thread % 32 == 0) to[size] = total;
  }
  __syncthreads();
  float* mine = c.partials + ((c.parity * kDecodeCluster + c.rank) * Rows) * row_floats;
  for (int i = thread; i < Rows * (size + 1); i += kDecodeThreads) {
    const int r = i / (size + 1), d = i % (size + 1);
    float sum = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) sum += c.m.warps[(w * Rows + r) * row_floats + d];
    mine[r * row_floats + d] = sum;
  }
  if (thread == 0) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) mine[r * row_floats + size + 1] = peak[r];
  }
  __syncwarp();  // lanes come to the cluster's barrier together
  hopper::cluster_sync();
  const float* all = c.partials + c.parity * kDecodeCluster * Rows * row_floats;
  for (int i = thread; i < Rows * (size + 1); i += kDecodeThreads) {
    const int r = i / (size + 1), d = i % (size + 1);
    float most = hopper::bits_float(0xff800000u), sum = 0.0f;
    for (int b = 0; b < kDecodeCluster; ++b) most = fmaxf(most, __ldcg(all + (b * Rows + r) * row_floats + size + 1));
    const float base = most == hopper::bits_float(0xff800000u) ? 0.0f : most;
    for (int b = 0; b < kDecodeCluster; ++b) {
      const float* from = all + (b * Rows + r) * row_floats;
      sum += __ldcg(from + d) * hopper::exp2_flushed(__ldcg(from + size + 1) - base);
    }
    c.m.sums[r * row_floats + d] = sum;
    if (d == size) c.m.sums[r * row_floats + size + 1] = base;
  }
  c.parity ^= 1;
  __syncthreads();
}

// Scores, peak, omega and kbar, which go to memory: numbers and m.mean.
template <class T, int Rows>
TILEWRIGHT_DEVICE void weigh_cache(Decoder<T, Rows>& c) {
  const float lowest = hopper::bits_float(0xff800000u);
  const float scale = static_cast<float>(c.p.options.scale) * 1.4426950408889634f;
  float query[Rows][kOwnElements], own[Rows][kOwnElements], peak[Rows], omega[Rows];
  c.take(c.m.direction, c.key_size, query);  // q
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    peak[r] = lowest;
    omega[r] = 0.0f;
#pragma unroll
    for (int e = 0; e < kOwnElements; ++e) own[r][e] = 0.0f;
  }
  walk_cache<Wanted{false, false}>(
      c, [&](int64_t key, const float (&elements)[kOwnElements], const float (&)[kOwnElements], const float (&)[Rows]) {
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          float score = 0.0f;
#pragma unroll
          for (int e = 0; e < kOwnElements; ++e) score = fmaf(query[r][e], elements[e], score);
          score = c.group_sum(score) * scale;
          if (key >= c.end || !c.sees(r, key)) continue;
          if (c.lane == 0) c.scores(r)[key] = score;
          if (score > peak[r]) {
            const float shrink = hopper::exp2_flushed(peak[r] - score);
            peak[r] = score;
            omega[r] *= shrink;
#pragma unroll
            for (int e = 0; e < kOwnElements; ++e) own[r][e] *= shrink;
          }
          const float w = hopper::exp2_flushed(score - peak[r]);
          omega[r] += w;
#pragma unroll
          for (int e = 0; e < kOwnElements; ++e) own[r][e] = fmaf(w, elements[e], own[r][e]);
        }
      });
  // To the block's own peaks.
  __syncthreads();
  float most[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    most[r] = peak[r];
    for (int offset = 16; offset > 0; offset /= 2) {
      most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffu, most[r], offset));
    }
    if (threadIdx.x % 32 == 0) c.m.sums[threadIdx.x / 32 * Rows + r] = most[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < kDecodeWarps; ++w) most[r] = fmaxf(most[r], c.m.sums[w * Rows + r]);
    const float shrink = peak[r] == lowest ? 0.0f : hopper::exp2_flushed(peak[r] - most[r]);
    // A row whose scores are not numbers has no peak, but it has seen keys: its omega says so.
    omega[r] = omega[r] == 0.0f ? 0.0f : omega[r] * (omega[r] == omega[r] ? shrink : 1.0f);
#pragma unroll
    for (int e = 0; e < kOwnElements; ++e) own[r][e] *= shrink;
  }
  exchange(c, own, omega, most, c.key_size);
}

// m.sums = sum_j w_j (k_j - kbar).p k_j and the sum of the factors.
template <class T, int Rows>
TILEWRIGHT_DEVICE void apply_to_cache(Decoder<T, Rows>& c, const float* from) {
  using M = DecodeMemory<Rows>;
  float vector[Rows][kOwnElements], own[Rows][kOwnElements], drift[Rows], none[Rows], peak[Rows], shift[Rows];
  c.take(from, c.key_size, vector);
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    drift[r] = none[r] = 0.0f;
    peak[r] = c.m.number(r, M::kPeak);
    shift[r] = c.m.number(r, M::kShift);
#pragma unroll
    for (int e = 0; e < kOwnElements; ++e) own[r][e] = 0.0f;
  }
  walk_cache<Wanted{true, false}>(c, [&](int64_t, const float (&elements)[kOwnElements], const float (&)[kOwnElements],
                                         const float (&scores)[Rows]) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      float along = 0.0f;
#pragma unroll
      for (int e = 0; e < kOwnElements; ++e) along = fmaf(vector[r][e], elements[e], along);
      along = c.group_sum(along);
      // Where a cluster has one row, its block's keys are those that it sees, and a step has no branch.
      if (Rows > 1 && scores[r] == hopper::bits_float(0xff800000u)) continue;
      const float factor = hopper::exp2_flushed(scores[r] - peak[r]) * (along - shift[r]);
      drift[r] += factor;
#pragma unroll
      for (int e = 0; e < kOwnElements; ++e) own[r][e] = fmaf(factor, elements[e], own[r][e]);
    }
  });
  exchange(c, own, drift, none, c.key_size);
}

// m.sums = sum_j p_j a_j v_j and the sum of p_j a_j.
template <class T, int Rows>
TILEWRIGHT_DEVICE void read_cache(Decoder<T, Rows>& c) {
  using M = DecodeMemory<Rows>;
  float vector[Rows][kOwnElements], own[Rows][kOwnElements], total[Rows], none[Rows];
  float peak[Rows], shift[Rows], inverse[Rows];
  c.take(c.m.x, c.key_size, vector);
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    total[r] = none[r] = 0.0f;
    peak[r] = c.m.number(r, M::kPeak);
    shift[r] = c.m.number(r, M::kShift);
    inverse[r] = c.m.number(r, M::kInverse);
#pragma unroll
    for (int e = 0; e < kOwnElements; ++e) own[r][e] = 0.0f;
  }
  walk_cache<Wanted{true, true}>(c, [&](int64_t, const float (&elements)[kOwnElements],
                                        const float (&value)[kOwnElements], const float (&scores)[Rows]) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      float along = 0.0f;
#pragma unroll
      for (int e = 0; e < kOwnElements; ++e) along = fmaf(vector[r][e], elements[e], along);
      along = c.group_sum(along);
      // Where a cluster has one row, its block's keys are those that it sees, and a step has no branch.
      if (Rows > 1 && scores[r] == hopper::bits_float(0xff800000u)) continue;
      const float weight = hopper::exp2_flushed(scores[r] - peak[r]) * inverse[r];
      const float tilted = weight * (1.0f + shift[r] - along);
      total[r] += tilted;
#pragma unroll
      for (int e = 0; e < kOwnElements; ++e) own[r][e] = fmaf(tilted, value[e], own[r][e]);
    }
  });
  exchange(c, own, total, none, c.value_size);
}

}  // namespace tilewright::local_linear_attention::cuda
