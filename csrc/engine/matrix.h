// SPDX-License-Identifier: Apache-2.0
// A weight matrix as the records use it, whatever its packed format. A new format is one file in matrices/ that registers
// itself; its blob's header says which one reads it.
#pragma once

#include <cstdint>

#include "engine/program.h"
#include "format/header.h"

namespace tilewright::engine {

enum class ActivationType : int64_t { kInt8 = 0, kFp8 = 1, kFp8Fold = 2 };

// What int4 matrices quantize each token to; formats with only one way ignore it.
struct Activation {
  ActivationType type = ActivationType::kInt8;
  int64_t scale_group = 0;  // columns that share a scale, a multiple of the weight's group; 0: the whole token
  bool operator==(const Activation&) const = default;
};

Activation read_activation(Reader& reader);

// Prepared activations of some tokens, in the layout of the matrices that share one InputKind.
struct Input {
  uint8_t* codes;
  float* scales;
  uint8_t* sums;
};

// Matrices with equal kinds read the same prepared input.
struct InputKind {
  format::FormatId format;
  Activation activation;
  int64_t columns, group;
  bool operator==(const InputKind&) const = default;
};

class Matrix {
 public:
  int64_t rows, columns;
  InputKind input;
  int64_t code_bytes, sum_bytes;  // of one prepared token
  int64_t scale_count = 1;  // likewise
  int64_t items = 0, rows_per_item = 0;  // after plan()

  virtual void plan(int64_t tokens) = 0;
  virtual void prepare(const float* x, const Input& input, int64_t token) const = 0;
  // y[t * stride + n] for all tokens and the rows n of items [first, last).
  virtual void run(const Input& input, int64_t tokens, int64_t first, int64_t last, float* y, int64_t stride) const = 0;
  // One dequantized row, for embeddings.
  virtual void row(int64_t n, float* out) const = 0;

 protected:
  ~Matrix() = default;
};

// Reads "<name>" (byte offset, bytes) from the record and checks the blob; rows and columns as given, or kAnyWidth.
Matrix* read_matrix(Reader& reader, StepArena& arena, const char* name, Activation activation, int64_t rows,
                    int64_t columns);

using OpenMatrix = Matrix* (*)(StepArena& arena, Arena blob, Activation activation, const char* record);

// At namespace scope in the format's file.
struct RegisterMatrix {
  RegisterMatrix(format::FormatId format, OpenMatrix open);
};

}  // namespace tilewright::engine
