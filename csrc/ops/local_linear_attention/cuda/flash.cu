// SPDX-License-Identifier: Apache-2.0
#include "ops/local_linear_attention/cuda/flash_forward.cuh"

namespace tilewright::local_linear_attention::cuda {
namespace {

// [rows, heads, size] as boxes of one head: 64 columns, so many rows.
template <class T>
hopper::TensorMap map_of(const void* base, int64_t rows, int64_t heads, int64_t size, int box_rows) {
  const auto bytes = static_cast<uint64_t>(size) * sizeof(T);
  const uint64_t sizes[3] = {static_cast<uint64_t>(size), static_cast<uint64_t>(heads), static_cast<uint64_t>(rows)};
  const uint64_t strides[2] = {bytes, bytes * static_cast<uint64_t>(heads)};
  const uint32_t box[3] = {128 / sizeof(T), 1, static_cast<uint32_t>(box_rows)};
  return hopper::make_tensor_map<T>(base, 3, sizes, strides, box, hopper::Swizzle::k128);
}

// Blocks of queries: of packed sequences at most one more each than their length in whole blocks.
int64_t query_blocks(const Sequences& s) {
  const int64_t per = s.offsets == nullptr ? s.queries : s.rows;
  const int64_t blocks = (per + kBlockRows - 1) / kBlockRows;
  return s.offsets == nullptr ? blocks * s.count : blocks + s.count;
}

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
                 hopper::Grid{.blocks = {query_blocks(sequences), static_cast<int>(shape.heads)},
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
