// SPDX-License-Identifier: Apache-2.0
// Products with some rows, or some columns, of an INT4 matrix and INT8 activations: what int4_linear computes, in the
// same order of float operations, without reading what is not asked for or meets a zero. The same bits.
#pragma once

#include "format/int4_sparse.h"
#include "isa/isa.h"

namespace tilewright::int4_sparse {

// One token as int4_linear's prepare_int8 leaves it.
struct Activation {
  const int8_t* codes;          // [K]
  const float* scales;          // [A], one for each scale_group columns
  const int32_t* sums;          // [G]
  int64_t scale_group;          // columns that share a scale: a multiple of the weight's group, or at least K
};

// out[i] = row rows[i] of the matrix times the token.
using Rows = void (*)(const format::Int4RowsView&, const Activation&, const int32_t* rows, int64_t count, float* out);

// Inputs whose code is not zero, ascending; starts[g]: the first of them in group g, starts[G]: how many.
struct Listed {
  const int32_t* inputs;
  const int32_t* starts;        // [G + 1]
};

// y[n - first] for outputs n of [first, last), first a multiple of kOutputsPerUnit.
// workspace: kWorkspaceFloats for each output, their number rounded up to kOutputsPerUnit.
using Columns = void (*)(const format::Int4ColumnsView&, const Activation&, const Listed&, int64_t first, int64_t last,
                         float* y, float* workspace);
inline constexpr int64_t kOutputsPerUnit = 128;  // a cache line of an input's run
inline constexpr int64_t kWorkspaceFloats = 2;   // of each output: the sum of a run of groups, and that of all

struct Kernels {
  Rows rows;
  Columns columns;
};

const Kernels& kernels();

// Fills inputs [K] and starts [G + 1].
void list_inputs(const format::Int4ColumnsView&, const int8_t* codes, int32_t* inputs, int32_t* starts);

#define TILEWRIGHT_INT4_SPARSE_LEVEL(level)                                                                   \
  namespace level {                                                                                           \
  void rows(const format::Int4RowsView&, const Activation&, const int32_t* rows, int64_t count, float* out);  \
  void columns(const format::Int4ColumnsView&, const Activation&, const Listed&, int64_t first, int64_t last, \
               float* y, float* workspace);                                                                   \
  }
TILEWRIGHT_INT4_SPARSE_LEVEL(generic)
TILEWRIGHT_INT4_SPARSE_LEVEL(avx2)
TILEWRIGHT_INT4_SPARSE_LEVEL(avx512)
#undef TILEWRIGHT_INT4_SPARSE_LEVEL

}  // namespace tilewright::int4_sparse
