// SPDX-License-Identifier: Apache-2.0
#include "engine/matrix.h"

#include <cstring>
#include <map>

namespace tilewright::engine {
namespace {

std::map<format::FormatId, OpenMatrix>& formats() {
  static std::map<format::FormatId, OpenMatrix> table;
  return table;
}

}  // namespace

RegisterMatrix::RegisterMatrix(format::FormatId format, OpenMatrix open) { formats()[format] = open; }

Activation read_activation(Reader& reader) {
  constexpr int64_t kMaxGroup = int64_t{1} << 31;
  const auto type = static_cast<ActivationType>(reader.integer("activation", 0, 2));
  return {type, reader.integer("scale group", 0, kMaxGroup)};
}

Matrix* read_matrix(Reader& reader, StepArena& arena, const char* name, Activation activation, int64_t rows,
                    int64_t columns) {
  const Arena blob = reader.blob(name);
  reader.check(blob.bytes >= static_cast<int64_t>(sizeof(format::PackedHeader)), name, " has ", blob.bytes,
               " bytes, fewer than the 64 of a packed header");
  format::FormatId format;
  std::memcpy(&format, blob.data + offsetof(format::PackedHeader, format), sizeof(format));
  const auto found = formats().find(format);
  reader.check(found != formats().end(), name, " has packed format ", static_cast<int>(format),
               ", which this build does not know");
  Matrix* matrix = found->second(arena, blob, activation, reader.kind());
  reader.check(rows == Reader::kAnyWidth || matrix->rows == rows, name, " has ", matrix->rows, " rows, its slot needs ",
               rows);
  reader.check(columns == Reader::kAnyWidth || matrix->columns == columns, name, " has ", matrix->columns,
               " columns, its input slot has ", columns);
  return matrix;
}

}  // namespace tilewright::engine
