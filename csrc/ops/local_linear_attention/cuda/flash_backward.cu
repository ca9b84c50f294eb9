// SPDX-License-Identifier: Apache-2.0
#include "ops/local_linear_attention/cuda/flash_backward_keys.cuh"
#include "ops/local_linear_attention/cuda/flash_maps.cuh"

namespace tilewright::local_linear_attention::cuda {
namespace {

template <class T, int D>
void launch_queries(const FlashBackward& f, const Sequences& sequences, hopper::Stream stream) {
  using S = FlashShape<T, D>;
  const Shape& shape = f.shape;
  const FlashQueriesParams<T> params{map_of<T>(f.q, sequences.rows, shape.heads, shape.key_size, kGroupRows),
                                     map_of<T>(f.k, f.key_rows, shape.kv_heads, shape.key_size, S::kKeys),
                                     map_of<T>(f.v, f.key_rows, shape.kv_heads, shape.value_size, S::kKeys),
                                     map_of<T>(f.grad, sequences.rows, shape.heads, shape.value_size, kGroupRows),
                                     shape,
                                     f.options,
                                     sequences,
                                     f.ridge,
                                     f.x,
                                     static_cast<T*>(f.dq),
                                     f.dridge,
                                     f.dx,
                                     f.u,
                                     static_cast<T*>(f.rounded_x),
                                     static_cast<T*>(f.rounded_u),
                                     static_cast<FlashGradRecord*>(f.records)};
  hopper::launch(flash_backward_queries<T, D>,
                 hopper::Grid{.blocks = {blocks_of(sequences, sequences.queries), static_cast<int>(shape.heads)},
                              .threads = kFlashThreads,
                              .shared_bytes = S::kBytes,
                              .stream = stream},
                 params);
}

template <class T, int D>
void launch_keys(const FlashBackward& f, const Sequences& sequences, hopper::Stream stream) {
  using S = KeysShape<T, D>;
  const Shape& shape = f.shape;
  const FlashKeysParams<T> params{map_of<T>(f.k, f.key_rows, shape.kv_heads, shape.key_size, kGroupRows),
                                  map_of<T>(f.v, f.key_rows, shape.kv_heads, shape.value_size, kGroupRows),
                                  map_of<T>(f.q, sequences.rows, shape.heads, shape.key_size, S::kRows),
                                  map_of<T>(f.rounded_x, sequences.rows, shape.heads, shape.key_size, S::kRows),
                                  map_of<T>(f.rounded_u, sequences.rows, shape.heads, shape.key_size, S::kRows),
                                  map_of<T>(f.grad, sequences.rows, shape.heads, shape.value_size, S::kRows),
                                  shape,
                                  f.options,
                                  sequences,
                                  static_cast<const FlashGradRecord*>(f.records),
                                  static_cast<T*>(f.dk),
                                  static_cast<T*>(f.dv)};
  hopper::launch(flash_backward_keys<T, D>,
                 hopper::Grid{.blocks = {blocks_of(sequences, sequences.keys), static_cast<int>(shape.kv_heads)},
                              .threads = kFlashThreads,
                              .shared_bytes = S::kBytes,
                              .stream = stream},
                 params);
}

}  // namespace

int64_t flash_record_floats() { return sizeof(FlashGradRecord) / sizeof(float); }

void flash_backward(const FlashBackward& problem, const Sequences& sequences, hopper::Stream stream) {
  if (sequences.rows == 0) return;
  const Shape& shape = problem.shape;
  if (shape.key_size <= 64 && shape.value_size <= 64) {
    launch_queries<hopper::bf16, 64>(problem, sequences, stream);
    launch_keys<hopper::bf16, 64>(problem, sequences, stream);
  } else {
    launch_queries<hopper::bf16, 128>(problem, sequences, stream);
    launch_keys<hopper::bf16, 128>(problem, sequences, stream);
  }
}

}  // namespace tilewright::local_linear_attention::cuda
