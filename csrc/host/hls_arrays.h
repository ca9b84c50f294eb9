// SPDX-License-Identifier: Apache-2.0
// numpy arrays of integers to streams of beats and back.
#pragma once

#include <pybind11/numpy.h>

#include <string>

#include "core/require.h"
#include "tilewright_hls/frames.h"

namespace tilewright::hls_sim {

namespace py = pybind11;
using namespace tilewright_hls;

inline constexpr int kLanes = 16;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
int rows_of(const Array<T>& array, const char* name) {
  require(array.ndim() == 2, name, ": got ", array.ndim(), " dimensions, needed [rows, width]");
  return static_cast<int>(array.shape(0));
}

// Rows of an array as beats; the last beat of a row is filled with `filler`, which the units must not read.
template <class T, int L, class E>
void write_rows(const Array<E>& array, hls::stream<Beat<T, L>>& out, int filler = 0) {
  const int rows = static_cast<int>(array.shape(0)), width = static_cast<int>(array.shape(1));
  const E* data = array.data();
  for (int row = 0; row < rows; ++row) {
    for (int beat = 0; beat < beats_for(width, L); ++beat) {
      Beat<T, L> made;
      for (int i = 0; i < L; ++i) {
        const int column = beat * L + i;
        made.at[i] = column < width ? static_cast<long long>(data[static_cast<long>(row) * width + column]) : filler;
      }
      made.last = beat == beats_for(width, L) - 1;
      out.write(made);
    }
  }
}

template <class E, class T, int L>
py::array_t<E> read_rows(hls::stream<Beat<T, L>>& in, int rows, int width) {
  py::array_t<E> array({rows, width});
  E* data = array.mutable_data();
  for (int row = 0; row < rows; ++row) {
    for (int beat = 0; beat < beats_for(width, L); ++beat) {
      const Beat<T, L> got = in.read();
      require(got.last == (beat == beats_for(width, L) - 1), "a row's last beat is not marked, or another is");
      for (int i = 0; i < L && beat * L + i < width; ++i) {
        data[static_cast<long>(row) * width + beat * L + i] = static_cast<E>(static_cast<long long>(got.at[i]));
      }
    }
  }
  in.expect_empty();
  return array;
}

template <class E, class T>
py::array_t<E> read_values(hls::stream<T>& in, int count) {
  py::array_t<E> array(count);
  for (int i = 0; i < count; ++i) array.mutable_data()[i] = static_cast<E>(static_cast<long long>(in.read()));
  in.expect_empty();
  return array;
}

// Streams of unlimited depth around a unit that is tested alone.
inline constexpr std::size_t kUnlimited = static_cast<std::size_t>(-1);

inline int as_int(const StatusWord& status) { return static_cast<int>(static_cast<long long>(status)); }

}  // namespace tilewright::hls_sim
