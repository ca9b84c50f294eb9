#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The CPU kernels' tests under the address and undefined-behaviour sanitizers.
#   scripts/sanitize.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
build=build/sanitize
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTILEWRIGHT_SANITIZE=ON -DTILEWRIGHT_CUDA=OFF \
  -DPython_EXECUTABLE="$PWD/.venv/bin/python" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" > "$build.log"
ninja -C "$build"
site=$(scripts/overlay_venv.sh "$build/venv")
rm -rf "$site/tilewright"
cp -r python/tilewright "$site/tilewright"
cmake --install "$build" --prefix "$site/tilewright" >> "$build.log"
# torch and Python were not built with the sanitizers, so the runtime comes first and their leaks are not ours to report.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
export OMP_NUM_THREADS=1
[[ $# -gt 0 ]] || set -- tests/formats tests/isa tests/ops tests/engine
exec "$build/venv/bin/python" -m pytest -q -p no:cacheprovider "$@"
