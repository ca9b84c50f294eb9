// SPDX-License-Identifier: Apache-2.0
// Local linear attention on the GPU: plain functions over plain data, device pointers inside. Nothing here reads what lies
// on the device: sequences are looked up by the blocks themselves.
#pragma once

#include "hopper/stream.h"
#include "ops/local_linear_attention/problem.h"

namespace tilewright::local_linear_attention::cuda {

// Where sequences begin, still on the device. Rows of q: `rows` in all, `queries` a sequence unless packed.
struct Sequences {
  const int64_t* offsets;  // [count + 1] of a packed row of rows; null for sequences of equal size
  const int64_t* lengths;  // [count] keys that each sequence holds of its `keys`; null for all
  int64_t count, rows, queries, keys;
};

// The plain kernels: a block of threads for each query row, any size, in T's own arithmetic.
struct PlainPlan {
  int64_t blocks;  // of threads; each takes every blocks-th row
  int shared_bytes;
  bool matrix_in_workspace;  // K (K + 1) / 2 doubles a block, where shared memory does not hold them
  int64_t workspace_doubles;
};
template <class T>
PlainPlan plan_plain(const Shape& shape, Solver solver, int64_t row_heads);

// Backward::centres is [N, HQ, K] here: what each row's mean of the keys is, less its last visible key.
template <class T>
void forward(const Forward<T>& problem, const Sequences& sequences, double* workspace, hopper::Stream stream);
template <class T>
void backward(const Backward<T>& problem, const Sequences& sequences, int64_t key_rows, double* workspace,
              hopper::Stream stream);

// The tensor-core form: q, k, v and o in bf16 or f16, the rest in float32. All arrays dense.
struct FlashForward {
  Shape shape;
  Options options;
  bool half;  // f16, not bf16
  int64_t key_rows;  // of k and v in all
  const void *q, *k, *v;
  const float* ridge;  // null for kGiven
  const float* given;  // x of kGiven, else null
  void* o;
  float *x, *rows;  // null for kGiven
  int32_t* iterations;
};

// Conjugate gradients or a given x, without preconditioner; K and V multiples of 8 up to 128.
bool flash_takes(const Shape& shape, const Options& options, int64_t query_rows, int64_t key_rows);
// Rows that belong to no sequence are not written.
void flash_forward(const FlashForward& problem, const Sequences& sequences, hopper::Stream stream);

// The same for the gradient, bf16 alone: factors of a gradient leave the range of f16.
struct FlashBackward {
  Shape shape;
  Options options;
  int64_t key_rows;
  const void *q, *k, *v, *grad;  // grad: of o
  const float* ridge;  // null for kGiven
  const float* x;  // [N, HQ, K]
  void *dq, *dk, *dv;  // rows that belong to no sequence are not written
  float* dridge;  // null for kGiven
  float* dx;  // [N, HQ, K] for kGiven, else null
  float* u;  // [N, HQ, K], workspace; null for kGiven
  void *rounded_x, *rounded_u;  // [N, HQ, K] in bf16, workspace; x and -u
  void* records;  // [HQ, N] of flash_record_floats() floats, workspace
};
int64_t flash_record_floats();
void flash_backward(const FlashBackward& problem, const Sequences& sequences, hopper::Stream stream);

// Few queries over a cache, cut over the blocks of clusters; float32 arithmetic whatever the storage.
enum class Storage : uint8_t { kFloat, kBfloat16, kHalf };
struct DecodePlan {
  bool takes;  // false: the other fields say nothing
  int rows;  // of a cluster
  int64_t chunks;  // clusters for the rows of a key head
  int64_t clusters;
  int width;  // the larger of K and V
  int lanes;  // that share a key
  int shared_bytes;
  int64_t partials;  // floats of the workspace for sums on their way
};
struct Decode {
  Shape shape;
  Options options;
  Storage type;
  const void *q, *k, *v;
  const float *ridge, *start;  // start: null for zero
  void* o;
  float *x, *rows;
  int32_t* iterations;
  float* scores;  // [N * HQ, S], workspace
  float* partials;  // workspace
};
DecodePlan plan_decode(const Shape& shape, const Options& options, const Sequences& sequences, int element_bytes);
void decode(const Decode& problem, const DecodePlan& plan, const Sequences& sequences, hopper::Stream stream);

}  // namespace tilewright::local_linear_attention::cuda
