// SPDX-License-Identifier: Apache-2.0
// Which rows are read, and how each of the three steps is cut into independent items. Pure: no memory is touched.
#pragma once

#include <cstdint>
#include <string>

namespace tilewright::sparse_gated_mlp {

struct Shape {
  int64_t tokens, hidden, inner;  // T, D, M
  int64_t element_bytes;          // of a weight
};

struct Plan {
  bool dense;                      // all rows are read, since almost all are needed
  int64_t rows;                    // of W_up and of W_down^T that are read
  int64_t gate_rows, gate_items;   // neurons of an item of W_gate
  int64_t up_rows, up_items;       // listed rows of an item of W_up
  int64_t columns, down_items;     // columns of an item of W_down^T
  int64_t bytes;                   // of weights, read once for up to kTokenTile tokens
  int64_t operations;              // multiplications and additions
};

// Above this share of needed rows one forward stream costs less than skipping.
inline constexpr double kDenseShare = 0.85;
// Tokens that one pass over W_down^T serves.
inline constexpr int64_t kTokenTile = 32;

// active: rows that some token keeps; threads: who will share the columns (results do not depend on it).
Plan choose_plan(const Shape& shape, int64_t active, int64_t threads);
std::string describe(const Plan& plan);

// The rows j with needed[j], ascending, into rows; their places in that list by class (j mod 32), each class ascending,
// into by_class; where each class starts into class_starts [kClasses + 1]. Returns how many.
int64_t list_rows(const uint8_t* needed, int64_t inner, int32_t* rows, int32_t* by_class, int32_t* class_starts);

}  // namespace tilewright::sparse_gated_mlp
