// SPDX-License-Identifier: Apache-2.0
// The gradient's last kernel where every channel of the keys has a decay: one chunk of a value head. With E and N of
// backward_collect.cuh without decays, and o element by element:
//
//   dQ_i       = scale exp(G_i) o (dO S^T)_i   + sum over j <= i of E_ij exp(G_i - G_j) o k_j
//   dK_read_i  = -exp(G_i) o (D dY S^T)_i      + sum over j <  i of N_ij exp(G_i - G_j) o k_j
//   dK_write_j = exp(G_n - G_j) o (D W dS^T)_j + sum over i >= j of E_ij exp(G_i - G_j) o q_i + N_ij exp(G_i - G_j) o k_i
//   dg_t       = sum over s >= t of (q o dQ + k o dK_read - k o dK_write)_s + rowsum(dS o S behind the chunk)
//
// Two warpgroups make what goes through the states, each for half of the channels, into float32 rows in shared memory, where
// the slices were. A warp then adds 16 rows' products with all rows before them, or behind them, both operands scaled to the
// token in between; a thread adds a channel's pairs within squares of 16 tokens.
#pragma once

#include "ops/linear_attention/cuda/backward_prepare_channel.cuh"
#include "ops/linear_attention/cuda/backward_slices.cuh"

namespace tilewright::linear_attention::cuda::backward {

inline constexpr int kChannelThreads = kCollectGroups * kGroup;

template <class T, int kKey>
struct ChannelCollectShared {
  using All = Tiles<T, kKey>;
  using Slice = SliceShared<T, kKey>;
  static constexpr int kLeading = ChannelSums<kKey>::kLeading;
  static constexpr int kRowBytes = kChunk * kLeading * 4;
  static constexpr int kKeys = 0;
  static constexpr int kQueries = kKeys + All::Keys::kBytes;
  static constexpr int kOutputPairs = kQueries + All::Keys::kBytes;  // E
  static constexpr int kKeyPairs = kOutputPairs + All::Pairs::kBytes;  // N
  static constexpr int kSlices = kKeyPairs + All::Pairs::kBytes;
  static constexpr int kRows = kSlices;  // dQ, dK_read, dK_write, in the slices' place
  static_assert(3 * kRowBytes <= kCollectStages * Slice::kSliceBytes, "rows fit where the slices were");
  static constexpr int kSums = kSlices + kCollectStages * Slice::kSliceBytes;
  static constexpr int kFactors = kSums + kRowBytes;
  static constexpr int kProducts = kFactors + kFactorBytes;  // of dS and S, by part of the columns and channel
  static constexpr int kParts = kChannelThreads / (kKey / 8);
  static constexpr int kBarriers = kProducts + kParts * kKey * 4;
  static constexpr int kBytes = kBarriers + (1 + kCollectStages) * 8;
  static_assert(kBytes <= hopper::kMaxSharedBytes, "the stages do not fit");
};

// 16 bytes of S times 16 of dS, by channel.
template <class T>
TILEWRIGHT_DEVICE void add_products(const char* state, const char* d_state, float (&sums)[8]) {
  const hopper::U128 a = hopper::load_16(state), b = hopper::load_16(d_state);
  const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    float low, high, d_low, d_high;
    hopper::unpack_pair<T>(left[x], low, high);
    hopper::unpack_pair<T>(right[x], d_low, d_high);
    sums[2 * x] += low * d_low;
    sums[2 * x + 1] += high * d_high;
  }
}

// Rows of a matrix of 64 tokens in float32.
template <int kKey>
struct FloatRows {
  static constexpr int kLeading = ChannelSums<kKey>::kLeading;
  float* at;

  TILEWRIGHT_DEVICE float& operator()(int row, int channel) const { return at[row * kLeading + channel]; }
};

template <class T, int kKey, bool kDelta>
class ChannelCollector {
  using Shared = ChannelCollectShared<T, kKey>;
  using Slice = SliceShared<T, kKey>;
  using All = Tiles<T, kKey>;

 public:
  TILEWRIGHT_DEVICE ChannelCollector(const Params& params, char* shared)
      : params_(params),
        p_(params.p),
        shared_(shared),
        head_(static_cast<int>(blockIdx.x % params.p.value_heads)),
        place_(blockIdx.x / params.p.value_heads),
        chunk_(chunk_at(params.p.sequences, place_)),
        sums_{reinterpret_cast<float*>(shared + Shared::kSums)},
        factors_{reinterpret_cast<const float*>(shared + Shared::kFactors)} {
    auto* rows = reinterpret_cast<float*>(shared + Shared::kRows);
    dq_ = {rows};
    dk_read_ = {rows + Shared::kRowBytes / 4};
    dk_write_ = {rows + 2 * (Shared::kRowBytes / 4)};
  }

  TILEWRIGHT_DEVICE void run() {
    if (chunk_.rows == 0) return;
    start();
    {
      Sums<kKey> sums;
      add_slices(sums);
      store_through_states(sums);
    }
    __syncthreads();
    const float anchor = thread() < kKey ? anchor_of(thread()) : 0.0f;
    __syncthreads();
    add_left();
    add_right();
    __syncthreads();
    add_squares();
    __syncthreads();
    store_rows();
    if (thread() < p_.key_size) store_d_decay(thread(), anchor);
  }

 private:
  static TILEWRIGHT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
  static TILEWRIGHT_DEVICE int group() { return static_cast<int>(threadIdx.x) / kGroup; }
  static TILEWRIGHT_DEVICE int in_group() { return fresh_thread() % kGroup; }

  TILEWRIGHT_DEVICE char* keys() const { return shared_ + Shared::kKeys; }
  TILEWRIGHT_DEVICE char* queries() const { return shared_ + Shared::kQueries; }
  TILEWRIGHT_DEVICE char* output_pairs() const { return shared_ + Shared::kOutputPairs; }
  TILEWRIGHT_DEVICE char* key_pairs() const { return shared_ + Shared::kKeyPairs; }
  TILEWRIGHT_DEVICE char* slice_at(int slice) const {
    return shared_ + Shared::kSlices + slice % kCollectStages * Slice::kSliceBytes;
  }
  TILEWRIGHT_DEVICE Barrier& keys_full() const { return *reinterpret_cast<Barrier*>(shared_ + Shared::kBarriers); }
  TILEWRIGHT_DEVICE Barrier& full(int slice) const { return (&keys_full())[1 + slice % kCollectStages]; }

  TILEWRIGHT_DEVICE void load(int slice) const {
    load_slice<T, kKey, kDelta>(params_, chunk_, place_, head_, slice, slice_at(slice), full(slice));
  }

  // Loads are under way, sums are made, Q and K are there.
  TILEWRIGHT_DEVICE void start() const {
    if (thread() == 0) {
      for (int i = 0; i < 1 + kCollectStages; ++i) hopper::init((&keys_full())[i], 1);
      hopper::fence_barrier_init();
      const int key_head = head_ / (p_.value_heads / p_.heads);
      hopper::arrive_expect(keys_full(), 2 * All::Keys::kBytes);
      load_rows<typename All::Keys>(keys(), params_.k, keys_full(), 0, key_head, chunk_.first, chunk_.batch);
      load_rows<typename All::Keys>(queries(), params_.q, keys_full(), 0, key_head, chunk_.first, chunk_.batch);
      for (int slice = 0; slice < kCollectStages && slice < p_.slices(); ++slice) load(slice);
    }
    sums_.load(p_, chunk_, head_);
    __syncthreads();
    hopper::wait(keys_full(), 0);
    if (chunk_.rows == kChunk) return;
    clear_rows<typename All::Keys>(keys(), chunk_.rows, thread(), kChannelThreads);
    clear_rows<typename All::Keys>(queries(), chunk_.rows, thread(), kChannelThreads);
  }

  // What goes through the states, without decays of this chunk; <dS, S> by channel; E and N; dV and dbeta.
  TILEWRIGHT_DEVICE void add_slices(Sums<kKey>& sums) {
#pragma unroll
    for (int i = 0; i < Sums<kKey>::kColumns / 2; ++i) sums.dq[i] = sums.dk_read[i] = sums.dk_write[i] = 0.0f;
    float products[8] = {};
    for (int slice = 0; slice < p_.slices(); ++slice) {
      char* from = slice_at(slice);
      hopper::wait(full(slice), static_cast<uint32_t>(slice / kCollectStages % 2));
      if (chunk_.rows < kChunk) clear_tails(from);
      if (slice == 0) keep_factors(from);
      hopper::keep(sums.dq);
      hopper::keep(sums.dk_read);
      hopper::keep(sums.dk_write);
      store_d_values<T, kKey, kDelta>(p_, chunk_, head_, slice, from);
      add_state_products(from, products);
      add_slice<T, kKey, kDelta, ChannelFactors>(1.0f, from, group(), in_group(), slice == 0, sums);
      hopper::wgmma_wait<0>();
      hopper::keep(sums.dq);
      hopper::keep(sums.dk_read);
      hopper::keep(sums.dk_write);
      hopper::keep(sums.pairs);
      __syncthreads();
      if (thread() == 0 && slice + kCollectStages < p_.slices()) load(slice + kCollectStages);
    }
    auto* to = reinterpret_cast<float*>(shared_ + Shared::kProducts);
#pragma unroll
    for (int x = 0; x < 8; ++x) to[thread() / (kKey / 8) * kKey + thread() % (kKey / 8) * 8 + x] = products[x];
    if (kDelta || group() == 0) {
      store_pairs<T, kKey, kDelta>(p_, chunk_, head_, factors_, group(), in_group(), sums.pairs,
                                   group() == 0 ? output_pairs() : key_pairs());
    }
  }

  TILEWRIGHT_DEVICE void clear_tails(char* slice) const {
    clear_rows<typename All::Values>(slice + Slice::kDOut, chunk_.rows, thread(), kChannelThreads);
    if constexpr (!kDelta) {
      clear_rows<typename All::Values>(slice + Slice::kErrors, chunk_.rows, thread(), kChannelThreads);
    }
    hopper::fence_async_shared();
    __syncthreads();
  }

  TILEWRIGHT_DEVICE void keep_factors(const char* slice) const {
    const auto* from = reinterpret_cast<const float*>(slice + Slice::kFactors);
    reinterpret_cast<float*>(shared_ + Shared::kFactors)[thread()] = from[thread()];
  }

  TILEWRIGHT_DEVICE void add_state_products(const char* slice, float (&products)[8]) const {
    const int channel = thread() % (kKey / 8) * 8;
#pragma unroll
    for (int row = thread() / (kKey / 8); row < kSlice; row += Shared::kParts) {
      const uint32_t at = All::State::offset(row, channel);
      add_products<T>(slice + Slice::kState + at, slice + Slice::kDState + at, products);
    }
  }

  TILEWRIGHT_DEVICE void store_through_states(const Sums<kKey>& sums) const {
    const int thread = in_group();
#pragma unroll
    for (int r = 0; r < Sums<kKey>::kColumns / 2; ++r) {
      const int i = hopper::accumulator_row(thread, r);
      const int channel = group() * Sums<kKey>::kColumns + hopper::accumulator_col(thread, r);
      const float into = exp2f(sums_(i, channel)), onto = sums_.decay(kChunk - 1, i, channel);
      dq_(i, channel) = p_.scale * into * sums.dq[r];
      if constexpr (kDelta) dk_read_(i, channel) = into * sums.dk_read[r];
      dk_write_(i, channel) = onto * sums.dk_write[r];
    }
  }

  // Row sums of dS o S behind the chunk: what is left of the state before it, and what the chunk wrote.
  TILEWRIGHT_DEVICE float anchor_of(int channel) const {
    const auto* parts = reinterpret_cast<const float*>(shared_ + Shared::kProducts) + channel;
    float before = 0.0f, written = 0.0f;
    for (int part = 0; part < Shared::kParts; ++part) before += parts[part * kKey];
    for (int i = 0; i < kChunk; ++i) {
      written += hopper::to_float(*All::Keys::at(static_cast<const void*>(keys()), i, channel)) * dk_write_(i, channel);
    }
    return factors_.whole(channel) * before + written;
  }

  // 16 tokens by 16 channels as two operands of mma, each row scaled by its decay to or from a token.
  template <bool kBefore>
  TILEWRIGHT_DEVICE void scaled_rows(char* tile, int token, int channel, int pivot, uint32_t (&b)[2][2]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8;
    uint32_t words[4];
    hopper::ldmatrix_x4_transposed(
        words, tile + All::Keys::offset(token + 8 * (matrix % 2) + lane % 8, channel + 8 * (matrix / 2)));
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int row = token + 8 * (m % 2) + 2 * (lane % 4), at = channel + 8 * (m / 2) + lane / 4;
      float low, high;
      hopper::unpack_pair<T>(words[m], low, high);
      low *= kBefore ? sums_.decay(pivot, row, at) : sums_.decay(row, pivot, at);
      high *= kBefore ? sums_.decay(pivot, row + 1, at) : sums_.decay(row + 1, pivot, at);
      b[m / 2][m % 2] = hopper::pack_pair<T>(low, high);
    }
  }

  // This warp's 16 tokens, and its first channel.
  static TILEWRIGHT_DEVICE int first_row() { return static_cast<int>(threadIdx.x) / 32 % 4 * kSquare; }
  static TILEWRIGHT_DEVICE int first_channel() { return group() * (kKey / kCollectGroups); }

  // Adds a product of 16 tokens by 8 channels, times each token's decay to or from the pivot.
  template <bool kBefore>
  TILEWRIGHT_DEVICE void add_tile(const FloatRows<kKey>& to, int channel, int pivot, const float (&d)[4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first_row() + lane / 4 + 8 * (r / 2), at = channel + 2 * (lane % 4) + r % 2;
      to(row, at) += (kBefore ? sums_.decay(row, pivot, at) : sums_.decay(pivot, row, at)) * d[r];
    }
  }

  // dQ and dK_read of a warp's tokens from all tokens before their square.
  TILEWRIGHT_DEVICE void add_left() const {
    const int first = first_row(), pivot = first - 1, lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8;
    if (first == 0) return;
#pragma unroll 1
    for (int channel = first_channel(); channel < first_channel() + kKey / kCollectGroups; channel += 16) {
      float dq[2][4] = {}, dk[2][4] = {};
      for (int token = 0; token < first; token += 16) {
        const uint32_t at = All::Pairs::offset(first + 8 * (matrix % 2) + lane % 8, token + 8 * (matrix / 2));
        uint32_t e[4], n[4], b[2][2];
        hopper::ldmatrix_x4(e, output_pairs() + at);
        if constexpr (kDelta) hopper::ldmatrix_x4(n, key_pairs() + at);
        scaled_rows<true>(keys(), token, channel, pivot, b);
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          hopper::mma_m16n8k16(dq[x], e, b[x], T{});
          if constexpr (kDelta) hopper::mma_m16n8k16(dk[x], n, b[x], T{});
        }
      }
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        add_tile<true>(dq_, channel + 8 * x, pivot, dq[x]);
        if constexpr (kDelta) add_tile<true>(dk_read_, channel + 8 * x, pivot, dk[x]);
      }
    }
  }

  // dK_write of a warp's tokens from all tokens behind their square.
  TILEWRIGHT_DEVICE void add_right() const {
    const int first = first_row(), pivot = first + kSquare - 1, lane = static_cast<int>(threadIdx.x) % 32;
    const int matrix = lane / 8;
#pragma unroll 1
    for (int channel = first_channel(); channel < first_channel() + kKey / kCollectGroups; channel += 16) {
      float dk[2][4] = {};
      for (int token = first + kSquare; token < kChunk; token += 16) {
        const uint32_t at = All::Pairs::offset(token + 8 * (matrix / 2) + lane % 8, first + 8 * (matrix % 2));
        uint32_t a[4], b[2][2];
        hopper::ldmatrix_x4_transposed(a, output_pairs() + at);
        scaled_rows<false>(queries(), token, channel, pivot, b);
        for (int x = 0; x < 2; ++x) hopper::mma_m16n8k16(dk[x], a, b[x], T{});
        if constexpr (kDelta) {
          hopper::ldmatrix_x4_transposed(a, key_pairs() + at);
          scaled_rows<false>(keys(), token, channel, pivot, b);
          for (int x = 0; x < 2; ++x) hopper::mma_m16n8k16(dk[x], a, b[x], T{});
        }
      }
#pragma unroll
      for (int x = 0; x < 2; ++x) add_tile<false>(dk_write_, channel + 8 * x, pivot, dk[x]);
    }
  }

  TILEWRIGHT_DEVICE float row_of(const char* tile, int row, int channel) const {
    return hopper::to_float(*All::Keys::at(static_cast<const void*>(tile), row, channel));
  }
  TILEWRIGHT_DEVICE float pair_of_tokens(const char* tile, int i, int j) const {
    return hopper::to_float(*All::Pairs::at(static_cast<const void*>(tile), i, j));
  }

  // Pairs of tokens of one square, a channel a thread; the block's halves take every other square.
  TILEWRIGHT_DEVICE void add_squares() const {
    const int channel = thread() % kKey;
#pragma unroll 1
    for (int first = thread() / kKey * kSquare; first < kChunk; first += kChannelThreads / kKey * kSquare) {
      float k[kSquare], sum[kSquare], written[kSquare];
#pragma unroll
      for (int j = 0; j < kSquare; ++j) {
        k[j] = row_of(keys(), first + j, channel);
        sum[j] = sums_(first + j, channel);
        written[j] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kSquare; ++i) {
        const float q = row_of(queries(), first + i, channel);
        float dq = 0.0f, dk = 0.0f;
#pragma unroll
        for (int j = 0; j <= i; ++j) {
          const float decay = i == j ? 1.0f : exp2f(sum[i] - sum[j]);
          const float e = decay * pair_of_tokens(output_pairs(), first + i, first + j);
          dq += e * k[j];
          written[j] += e * q;
          if (kDelta && j < i) {
            const float n = decay * pair_of_tokens(key_pairs(), first + i, first + j);
            dk += n * k[j];
            written[j] += n * k[i];
          }
        }
        dq_(first + i, channel) += dq;
        if constexpr (kDelta) dk_read_(first + i, channel) += dk;
      }
#pragma unroll
      for (int j = 0; j < kSquare; ++j) dk_write_(first + j, channel) += written[j];
    }
  }

  TILEWRIGHT_DEVICE int64_t token_of(int row) const {
    return (chunk_.batch * p_.sequences.tokens + chunk_.first + row) * p_.value_heads + head_;
  }

  TILEWRIGHT_DEVICE void store_rows() const {
    for (int i = thread(); i < chunk_.rows * kKey; i += kChannelThreads) {
      const int row = i / kKey, channel = i % kKey;
      if (channel >= p_.key_size) continue;
      const int64_t at = token_of(row) * p_.key_size + channel;
      p_.dq_wide[at] = dq_(row, channel);
      p_.dk_wide[at] = dk_write_(row, channel) + (kDelta ? dk_read_(row, channel) : 0.0f);
    }
  }

  TILEWRIGHT_DEVICE void store_d_decay(int channel, float sum) const {
    for (int i = chunk_.rows - 1; i >= 0; --i) {
      const float k = row_of(keys(), i, channel);
      sum += row_of(queries(), i, channel) * dq_(i, channel) - k * dk_write_(i, channel);
      if constexpr (kDelta) sum += k * dk_read_(i, channel);
      p_.dg[token_of(i) * p_.key_size + channel] = sum;
    }
  }

  const Params& params_;
  const ChunkBackward& p_;
  char* shared_;
  int head_;
  int64_t place_;
  Chunk chunk_;
  ChannelSums<kKey> sums_;
  ChannelFactors factors_;
  FloatRows<kKey> dq_{}, dk_read_{}, dk_write_{};
};

template <class T, int kKey, bool kDelta>
__global__ void __launch_bounds__(kChannelThreads, 1) collect_channel_kernel(const __grid_constant__ Params params) {
  ChannelCollector<T, kKey, kDelta>(params, hopper::shared_memory()).run();
}

}  // namespace tilewright::linear_attention::cuda::backward
