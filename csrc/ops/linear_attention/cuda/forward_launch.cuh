// SPDX-License-Identifier: Apache-2.0
// The chunk form's kernels one after the other. A file for each type of input instantiates it, so that they compile side by
// side.
#pragma once

#include "ops/linear_attention/cuda/forward_prepare.cuh"
#include "ops/linear_attention/cuda/forward_prepare_channel.cuh"
#include "ops/linear_attention/cuda/forward_states.cuh"
#include "ops/linear_attention/cuda/launch.h"

namespace tilewright::linear_attention::cuda {
namespace forward {

// Boxes of 64 columns by 64 tokens of one head.
template <class In>
hopper::TensorMap map_of(const Rows<const In>& rows, int64_t columns, int64_t heads, int64_t tokens, int64_t batch) {
  // The stride of a dimension of one is not read, but must be one that a tensor map may have.
  const auto bytes = [&](int64_t size, int64_t stride) {
    return static_cast<uint64_t>(size > 1 ? stride * static_cast<int64_t>(sizeof(In)) : round_up(columns, 8) * 2);
  };
  const uint64_t sizes[4] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(heads),
                             static_cast<uint64_t>(tokens), static_cast<uint64_t>(batch)};
  const uint64_t strides[3] = {bytes(heads, rows.head), bytes(tokens, rows.token), bytes(batch, rows.batch)};
  const uint32_t box[4] = {64, 1, kChunk, 1};
  return hopper::make_tensor_map<In>(rows.data, 4, sizes, strides, box, hopper::Swizzle::k128);
}

template <class In, int kKeys>
void run_prepare(const Problem<In, float>& p, const Prepared& to, hopper::Stream stream) {
  const int64_t places = tiles_of(p) / p.value_heads, group = p.value_heads / p.heads;
  const int members = plan_members(places * p.heads, group, hopper::multiprocessors());
  hopper::launch(prepare_kernel<In, kKeys>,
                 {.blocks = {.x = places, .y = static_cast<int>(p.heads * ceil_div(group, members))},
                  .threads = kPrepareThreads,
                  .shared_bytes = prepare::Layout<In, kKeys>::kBytes,
                  .stream = stream},
                 PrepareParams<In>{p, to, members});
}

template <class In, int kKeys, bool kDelta, bool kChannel>
void run_states(const Problem<In, float>& p, const Prepared& from, hopper::Stream stream) {
  using At = states::Layout<In, kKeys, kDelta, kChannel>;
  StatesParams<In> params{p, from, {}, {}, {}, 1, 1, kMaxStages};
  const int64_t batch = batch_of(p), tokens = p.sequences.tokens;
  params.v = map_of(p.v, p.value_size, p.value_heads, tokens, batch);
  params.q = kChannel ? params.v : map_of(p.q, p.key_size, p.heads, tokens, batch);
  params.k = kChannel ? params.v : map_of(p.k, p.key_size, p.heads, tokens, batch);
  const int64_t states = p.sequences.count * p.value_heads;
  const StatesPlan plan = plan_states(states, p.key_size, p.value_size, hopper::multiprocessors());
  params.groups = plan.groups;
  params.tiles = plan.tiles;
  if (At::bytes(params.groups, params.stages) > hopper::kMaxSharedBytes) --params.stages;
  hopper::launch(states_kernel<In, kKeys, kDelta, kChannel>,
                 {.blocks = {.x = states * params.tiles},
                  .threads = 128 * (At::consumers(params.groups) + 1),
                  .shared_bytes = At::bytes(params.groups, params.stages),
                  .stream = stream},
                 params);
}

template <class In, int kKeys, bool kDelta>
void run_prepare_channel(const Problem<In, float>& p, const Prepared& to, hopper::Stream stream) {
  hopper::launch(prepare_channel_kernel<In, kKeys, kDelta>,
                 {.blocks = {.x = tiles_of(p) / p.value_heads, .y = static_cast<int>(p.value_heads)},
                  .threads = kPrepareThreads,
                  .shared_bytes = prepare::ChannelLayout<In, kKeys>::kBytes,
                  .stream = stream},
                 PrepareParams<In>{p, to, 1});
}

template <class In, int kKeys, bool kDelta>
void run_both(const Problem<In, float>& p, const Prepared& buffers, hopper::Stream stream) {
  if constexpr (kKeys <= 128) {
    if (p.decay == Decay::kChannel) {
      run_prepare_channel<In, kKeys, kDelta>(p, buffers, stream);
      run_states<In, kKeys, kDelta, true>(p, buffers, stream);
      return;
    }
  }
  if constexpr (kDelta) run_prepare<In, kKeys>(p, buffers, stream);
  run_states<In, kKeys, kDelta, false>(p, buffers, stream);
}

template <class In, int kKeys>
void run_rule(const Problem<In, float>& p, const Prepared& buffers, hopper::Stream stream) {
  const bool delta = p.rule == Rule::kDelta;
  delta ? run_both<In, kKeys, true>(p, buffers, stream) : run_both<In, kKeys, false>(p, buffers, stream);
}

template <class Row>
Rows<Row> from_token(const Rows<Row>& rows, int64_t token) {
  return {rows.data == nullptr ? nullptr : rows.data + token * rows.token, rows.batch, rows.token, rows.head};
}

// Tokens [first, first + tokens) of every sequence; states go on from where the stretch before left them.
template <class In>
Problem<In, float> stretch_of(const Problem<In, float>& p, int64_t first, int64_t tokens) {
  Problem<In, float> stretch = p;
  stretch.sequences.tokens = tokens;
  stretch.q = from_token(p.q, first);
  stretch.k = from_token(p.k, first);
  stretch.v = from_token(p.v, first);
  stretch.beta = from_token(p.beta, first);
  stretch.g = from_token(p.g, first);
  stretch.out = from_token(p.out, first);
  if (first > 0) stretch.initial = p.state;
  return stretch;
}

template <class In>
void run_stretch(const Problem<In, float>& p, char* memory, hopper::Stream stream) {
  Prepared buffers;
  place_buffers(p.rule, p.decay, p.key_size, tiles_of(p), memory, buffers);
  const int keys = tile_keys(p.key_size);
  if (keys == 64) run_rule<In, 64>(p, buffers, stream);
  if (keys == 128) run_rule<In, 128>(p, buffers, stream);
  if (keys == 256) run_rule<In, 256>(p, buffers, stream);
}

}  // namespace forward

template <class In>
void launch_chunks(const Problem<In, float>& p, char* memory, hopper::Stream stream) {
  const int64_t tokens = p.sequences.tokens, step = stretch_tokens(p);
  for (int64_t first = 0; first < tokens; first += step) {
    forward::run_stretch(forward::stretch_of(p, first, std::min(step, tokens - first)), memory, stream);
  }
}

}  // namespace tilewright::linear_attention::cuda
