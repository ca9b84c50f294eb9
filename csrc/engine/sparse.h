// SPDX-License-Identifier: Apache-2.0
// Matrices of which a step reads some rows, or what meets the inputs that are not zero. Each gives the bits of the dense
// Matrix of the same weight, on the same prepared token. One file a format, as in matrix.h.
#pragma once

#include "engine/matrix.h"

namespace tilewright::engine {

class SparseRows {
 public:
  int64_t rows, columns;
  int64_t row_bytes;  // that lie together
  InputKind input;

  // out[i] = row rows[i] times the token.
  virtual void run(const Input& token, const int32_t* rows, int64_t count, float* out) const = 0;

 protected:
  ~SparseRows() = default;
};

class SparseColumns {
 public:
  int64_t rows, columns;  // of the weight: outputs, inputs
  InputKind input;
  int64_t list_bytes;  // of a list
  int64_t outputs_per_unit;  // first outputs of a run() are multiples of this
  virtual int64_t workspace_bytes(int64_t outputs) const = 0;

  // Which inputs of the token are not zero.
  virtual void list(const Input& token, uint8_t* list) const = 0;
  // y[n - first] of outputs n of [first, last).
  virtual void run(const Input& token, const uint8_t* list, int64_t first, int64_t last, float* y,
                   uint8_t* workspace) const = 0;

 protected:
  ~SparseColumns() = default;
};

// Null where the record has no such blob.
SparseRows* read_sparse_rows(Reader& reader, StepArena& arena, const char* name, const Matrix& dense);
SparseColumns* read_sparse_columns(Reader& reader, StepArena& arena, const char* name, const Matrix& dense);

using OpenSparseRows = SparseRows* (*)(StepArena& arena, Arena blob, const Matrix& dense, const char* record);
using OpenSparseColumns = SparseColumns* (*)(StepArena& arena, Arena blob, const Matrix& dense, const char* record);

// At namespace scope in the format's file.
struct RegisterSparse {
  RegisterSparse(format::FormatId rows, OpenSparseRows open_rows, format::FormatId columns,
                 OpenSparseColumns open_columns);
};

}  // namespace tilewright::engine
