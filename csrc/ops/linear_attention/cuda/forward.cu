// SPDX-License-Identifier: Apache-2.0
// Instances of the chunk form's kernels, and how they share the work.
#include "ops/linear_attention/cuda/forward_prepare.cuh"
#include "ops/linear_attention/cuda/forward_states.cuh"
#include "ops/linear_attention/cuda/launch.h"

namespace tilewright::linear_attention::cuda {
namespace {

// Rows that the copy engine and 16-byte loads can read: no dimension is repeated.
template <class In>
bool copyable(const Rows<const In>& rows, int64_t batch, int64_t tokens, int64_t heads) {
  const auto fits = [](int64_t size, int64_t stride) { return size <= 1 || (stride > 0 && stride % 8 == 0); };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && fits(batch, rows.batch) && fits(tokens, rows.token) &&
         fits(heads, rows.head);
}

template <class In>
int64_t batch_of(const Problem<In, float>& p) {
  return p.sequences.offsets == nullptr ? p.sequences.count : 1;
}

template <class In>
int64_t tiles_of(const Problem<In, float>& p) {
  return chunk_places(p.sequences.count, p.sequences.tokens, p.sequences.offsets != nullptr) * p.value_heads;
}

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

template <class In, int kKeys, bool kDelta>
void run_prepare(const Problem<In, float>& p, const Prepared& to, hopper::Stream stream) {
  const int64_t places = tiles_of(p) / p.value_heads;
  hopper::launch(prepare_kernel<In, kKeys, kDelta>,
                 {.blocks = {.x = places, .y = static_cast<int>(p.heads)},
                  .threads = kPrepareThreads,
                  .shared_bytes = prepare::Layout<In, kKeys>::kBytes,
                  .stream = stream},
                 PrepareParams<In>{p, to});
}

template <class In, int kKeys, bool kDelta, bool kChannel>
void run_states(const Problem<In, float>& p, const Prepared& from, hopper::Stream stream) {
  using At = states::Layout<In, kKeys, kDelta, kChannel>;
  StatesParams<In> params{p, from, {}, {}, {}, 1, 1, kMaxStages};
  const int64_t batch = batch_of(p), tokens = p.sequences.tokens;
  params.v = map_of(p.v, p.value_size, p.value_heads, tokens, batch);
  params.q = kChannel ? params.v : map_of(p.q, p.key_size, p.heads, tokens, batch);
  params.k = kChannel ? params.v : map_of(p.k, p.key_size, p.heads, tokens, batch);
  // Two warpgroups of a block share the tiles of keys, unless one each keeps more multiprocessors busy.
  const int64_t states = p.sequences.count * p.value_heads, columns = ceil_div(p.value_size, kGroupColumns);
  if (columns > 1 && states * ceil_div(columns, kMaxGroups) >= hopper::multiprocessors()) params.groups = kMaxGroups;
  params.tiles = static_cast<int>(ceil_div(columns, params.groups));
  if (At::bytes(params.groups, params.stages) > hopper::kMaxSharedBytes) --params.stages;
  hopper::launch(states_kernel<In, kKeys, kDelta, kChannel>,
                 {.blocks = {.x = states * params.tiles},
                  .threads = 128 * (params.groups + 1),
                  .shared_bytes = At::bytes(params.groups, params.stages),
                  .stream = stream},
                 params);
}

template <class In, int kKeys, bool kDelta>
void run_both(const Problem<In, float>& p, const Prepared& buffers, hopper::Stream stream) {
  run_prepare<In, kKeys, kDelta>(p, buffers, stream);
  run_states<In, kKeys, kDelta, false>(p, buffers, stream);
}

}  // namespace

template <class In, class T>
bool takes_chunks(const Problem<In, T>& p) {
  if constexpr (sizeof(In) != 2) {
    return false;
  } else {
    const int64_t batch = batch_of(p), tokens = p.sequences.tokens;
    return p.decay != Decay::kChannel && tile_keys(p.key_size) > 0 && p.key_size % 8 == 0 && p.value_size % 8 == 0 &&
           tokens > 1 && p.slots == nullptr && copyable(p.q, batch, tokens, p.heads) &&
           copyable(p.k, batch, tokens, p.heads) && copyable(p.v, batch, tokens, p.value_heads);
  }
}

template <class In, class T>
int64_t chunk_form_bytes(const Problem<In, T>& p) {
  if constexpr (sizeof(In) == 2) {
    Prepared unused;
    if (takes_chunks(p)) return place_buffers(p.rule, p.decay, p.key_size, tiles_of(p), nullptr, unused);
  }
  return 0;
}

template <class In>
void launch_prepare(const Problem<In, float>& p, const Prepared& to, hopper::Stream stream) {
  const bool delta = p.rule == Rule::kDelta;
  if (tile_keys(p.key_size) == 64) {
    delta ? run_prepare<In, 64, true>(p, to, stream) : run_prepare<In, 64, false>(p, to, stream);
  } else {
    delta ? run_prepare<In, 128, true>(p, to, stream) : run_prepare<In, 128, false>(p, to, stream);
  }
}

template <class In>
void launch_chunks(const Problem<In, float>& p, char* memory, hopper::Stream stream) {
  Prepared buffers;
  place_buffers(p.rule, p.decay, p.key_size, tiles_of(p), memory, buffers);
  const bool delta = p.rule == Rule::kDelta;
  if (tile_keys(p.key_size) == 64) {
    delta ? run_both<In, 64, true>(p, buffers, stream) : run_both<In, 64, false>(p, buffers, stream);
  } else {
    delta ? run_both<In, 128, true>(p, buffers, stream) : run_both<In, 128, false>(p, buffers, stream);
  }
}

template bool takes_chunks(const Problem<hopper::bf16, float>&);
template bool takes_chunks(const Problem<hopper::f16, float>&);
template bool takes_chunks(const Problem<float, float>&);
template bool takes_chunks(const Problem<double, double>&);
template int64_t chunk_form_bytes(const Problem<hopper::bf16, float>&);
template int64_t chunk_form_bytes(const Problem<hopper::f16, float>&);
template int64_t chunk_form_bytes(const Problem<float, float>&);
template int64_t chunk_form_bytes(const Problem<double, double>&);
template void launch_prepare(const Problem<hopper::bf16, float>&, const Prepared&, hopper::Stream);
template void launch_prepare(const Problem<hopper::f16, float>&, const Prepared&, hopper::Stream);
template void launch_chunks(const Problem<hopper::bf16, float>&, char*, hopper::Stream);
template void launch_chunks(const Problem<hopper::f16, float>&, char*, hopper::Stream);

}  // namespace tilewright::linear_attention::cuda
