// SPDX-License-Identifier: Apache-2.0
#include "engine/sparse.h"

#include <cstring>
#include <map>

namespace tilewright::engine {
namespace {

template <class Open>
std::map<format::FormatId, Open>& formats() {
  static std::map<format::FormatId, Open> table;
  return table;
}

template <class Open>
auto read(Reader& reader, StepArena& arena, const char* name, const Matrix& dense) {
  const Arena blob = reader.blob(name);
  reader.check(blob.bytes >= static_cast<int64_t>(sizeof(format::PackedHeader)), name, " has ", blob.bytes,
               " bytes, fewer than the 64 of a packed header");
  format::FormatId format;
  std::memcpy(&format, blob.data + offsetof(format::PackedHeader, format), sizeof(format));
  const auto found = formats<Open>().find(format);
  reader.check(found != formats<Open>().end(), name, " has packed format ", static_cast<int>(format),
               ", which is not one that this build reads by rows");
  auto* matrix = found->second(arena, blob, dense, reader.kind());
  reader.check(matrix->rows == dense.rows && matrix->columns == dense.columns && matrix->input == dense.input, name,
               " is [", matrix->rows, ", ", matrix->columns, "], it must be the matrix [", dense.rows, ", ",
               dense.columns, "] of the same record, in the same groups");
  return matrix;
}

}  // namespace

RegisterSparse::RegisterSparse(format::FormatId rows, OpenSparseRows open_rows, format::FormatId columns,
                               OpenSparseColumns open_columns) {
  formats<OpenSparseRows>()[rows] = open_rows;
  formats<OpenSparseColumns>()[columns] = open_columns;
}

SparseRows* read_sparse_rows(Reader& reader, StepArena& arena, const char* name, const Matrix& dense) {
  return read<OpenSparseRows>(reader, arena, name, dense);
}

SparseColumns* read_sparse_columns(Reader& reader, StepArena& arena, const char* name, const Matrix& dense) {
  return read<OpenSparseColumns>(reader, arena, name, dense);
}

}  // namespace tilewright::engine
