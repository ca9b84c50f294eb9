// SPDX-License-Identifier: Apache-2.0
// Very few tokens: each block rounds them itself, while its weights are on their way, and keeps all their columns in shared
// memory. No other kernel goes before, and none has to be waited for. The codes are those of quantize.cuh.
#pragma once

#include "ops/int4_linear/cuda/consumer.cuh"
#include "ops/int4_linear/cuda/quantize.cuh"

namespace tilewright::int4_linear {

inline constexpr int kAllConsumers = 128 * kConsumers;

// The largest magnitude of the thread's columns of each token; infinite where something is not finite.
template <class T>
TILEWRIGHT_DEVICE void find_largest(const MatrixParams& p, int thread, float (&largest)[kResidentTokens]) {
  for (int64_t k = static_cast<int64_t>(thread) * kPiece; k < p.k; k += kAllConsumers * kPiece) {
#pragma unroll
    for (int t = 0; t < kResidentTokens; ++t) {
      if (t >= p.m) continue;
      float values[kPiece];
      load_piece(static_cast<const T*>(p.x_given) + t * p.k, k, p.k, values);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) largest[t] = with_magnitude(largest[t], values[i]);
    }
  }
}

// Scales of the tokens in every thread, and for the epilogue in shared memory.
template <class C>
TILEWRIGHT_DEVICE void find_divisors(const Shared<C>& shared, int thread, const float (&largest)[kResidentTokens],
                                     float (&divisors)[kResidentTokens]) {
  constexpr int kWarps = kAllConsumers / 32;
#pragma unroll
  for (int t = 0; t < kResidentTokens; ++t) {
    float most = largest[t];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    if (thread % 32 == 0) shared.staging[t * kWarps + thread / 32] = most;
  }
  if (thread >= kResidentTokens && thread < C::kTokens) shared.scales[thread] = 0.0f;  // read, for no token
  hopper::named_sync(kRoundBarrier, kAllConsumers);
#pragma unroll
  for (int t = 0; t < kResidentTokens; ++t) {
    float most = 0.0f;
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, shared.staging[t * kWarps + w]);
    const float scale = most / kFp8Limit;
    divisors[t] = scale == 0.0f ? 1.0f : scale;
    if (thread == 0) shared.scales[t] = most <= kLargestFloat ? divisors[t] : hopper::bits_float(0x7fc00000u);
  }
}

template <class C, class T>
TILEWRIGHT_DEVICE void round_tokens_of(const MatrixParams& p, const Shared<C>& shared, int thread) {
  float largest[kResidentTokens] = {}, divisors[kResidentTokens];
  find_largest<T>(p, thread, largest);
  find_divisors(shared, thread, largest, divisors);
  for (int k = thread * kPiece; k < p.work.k_tiles * Int4Hopper::kCols; k += kAllConsumers * kPiece) {
    char* tile = shared.tokens_of(0, k / Int4Hopper::kCols);
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
      hopper::U128 codes{0, 0, 0, 0};
      if (t < kResidentTokens && t < p.m && divisors[t % kResidentTokens] <= kLargestFloat) {
        float values[kPiece];
        load_piece(static_cast<const T*>(p.x_given) + t * p.k, k, p.k, values);
        codes = round_piece(values, divisors[t % kResidentTokens]);
      }
      hopper::store_16(C::Tokens::at(static_cast<void*>(tile), t, k % Int4Hopper::kCols), codes);
    }
  }
}

// All consumer threads. The products read what ordinary stores wrote.
template <class C>
TILEWRIGHT_DEVICE void round_tokens(const MatrixParams& p, const Shared<C>& shared) {
  const int thread = static_cast<int>(threadIdx.x) - 128;
  switch (p.x_type) {
    case Number::kFloat32: round_tokens_of<C, float>(p, shared, thread); break;
    case Number::kBFloat16: round_tokens_of<C, hopper::bf16>(p, shared, thread); break;
    case Number::kFloat16: round_tokens_of<C, hopper::f16>(p, shared, thread); break;
  }
  hopper::fence_async_shared();
  hopper::named_sync(kRoundBarrier, kAllConsumers);
}

}  // namespace tilewright::int4_linear
