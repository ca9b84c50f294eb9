// SPDX-License-Identifier: Apache-2.0
#include "ops/local_linear_attention/cuda/flash_forward.cuh"
#include "ops/local_linear_attention/cuda/flash_maps.cuh"

namespace tilewright::local_linear_attention::cuda {
namespace {

template <class T, int D>
void launch_forward(const FlashForward& f, const Sequences& sequences, hopper::Stream stream) {
  using S = FlashShape<T, D>;
  const Shape& shape = f.shape;
  FlashForwardParams<T> params{map_of<T>(f.q, sequences.rows, shape.heads, shape.key_size, kGroupRows),
                               map_of<T>(f.k, f.key_rows, shape.kv_heads, shape.key_size, S::kKeys),
                               map_of<T>(f.v, f.key_rows, shape.kv_heads, shape.value_size, S::kKeys),
                               shape,
                               f.options,
                               sequences,
                               f.ridge,
                               f.given,
                               static_cast<T*>(f.o),
                               f.x,
                               f.rows,
                               f.iterations};
  hopper::launch(flash_forward<T, D>,
                 hopper::Grid{.blocks = {blocks_of(sequences, sequences.queries), static_cast<int>(shape.heads)},
                              .threads = kFlashThreads,
                              .shared_bytes = S::kBytes,
                              .stream = stream},
                 params);
}

template <class T>
void launch_forward(const FlashForward& f, const Sequences& sequences, hopper::Stream stream) {
  const int64_t size = f.shape.key_size > f.shape.value_size ? f.shape.key_size : f.shape.value_size;
  if (size <= 64) {
    launch_forward<T, 64>(f, sequences, stream);
  } else {
    launch_forward<T, 128>(f, sequences, stream);
  }
}

}  // namespace

bool flash_takes(const Shape& shape, const Options& options, int64_t query_rows, int64_t key_rows) {
  constexpr int64_t kMost = int64_t{1} << 31;
  return options.solver != Solver::kCholesky && !options.jacobi && shape.key_size <= 128 && shape.value_size <= 128 &&
         shape.key_size % 8 == 0 && shape.value_size % 8 == 0 && shape.value_size > 0 &&
         query_rows < kMost - kBlockRows && key_rows > 0 && key_rows < kMost - kBlockRows && shape.heads <= 65535;
}

void flash_forward(const FlashForward& problem, const Sequences& sequences, hopper::Stream stream) {
  if (sequences.rows == 0) return;
  if (problem.half) {
    launch_forward<hopper::f16>(problem, sequences, stream);
  } else {
    launch_forward<hopper::bf16>(problem, sequences, stream);
  }
}

}  // namespace tilewright::local_linear_attention::cuda
