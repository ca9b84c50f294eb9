#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The native libraries, built here, for a GPU machine that has another Python and cannot build them in good time:
# build/bundle holds the two operator libraries, which serve every Python, and the objects of the small pybind11 module,
# whose Python-dependent sources scripts/gpu.sh compiles there.
#   scripts/gpu_bundle.sh [BUILD FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
BUILD=${1:-build/gpu}
BUNDLE=build/bundle
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
test -f "$BUILD/build.ninja" || "$PYTHON" -m cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DTILEWRIGHT_CUDA=ON \
  -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF   -DPython_EXECUTABLE="$PYTHON" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)"
"$PYTHON" -m cmake --build "$BUILD" --target tilewright_ops tilewright_cuda _host
rm -rf "$BUNDLE"
mkdir -p "$BUNDLE"
tar czf "$BUNDLE/lib.tgz" -C "$BUILD" libtilewright_ops.so libtilewright_cuda.so
find "$BUILD/CMakeFiles/tilewright_core.dir" "$BUILD/CMakeFiles/_host.dir/csrc/microbench" -name '*.o' -print0 |
  xargs -0 ar rcs "$BUNDLE/host.a"
nvcc -std=c++20 -O2 -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -Icsrc \
  -o "$BUNDLE/hopper_wrappers" tests/cuda/hopper_wrappers.cu
git describe --always --dirty --abbrev=12 > "$BUNDLE/commit"
du -sh "$BUNDLE"
