#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that wants a GPU: tests, compute-sanitizer, repeated runs, benchmarks. Give the steps to run:
#   PYTHON=python3 OUT=reports/gpu scripts/gpu.sh test sanitize repeat bench
# The interpreter needs torch with CUDA, pytest and the package's dependencies. Where the package is not installed for it,
# the libraries come from build/bundle (scripts/gpu_bundle.sh). A step that fails does not stop the others; the exit code
# says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-reports/gpu}
KERNELS=${KERNELS:-}                 # pytest -k and bench module; empty: all
LIMIT=${LIMIT:-150}                  # seconds that a step may take for one kernel
SANITIZER=${SANITIZER:-compute-sanitizer}
mkdir -p "$OUT"
export PYTHONPATH=$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

native() {
  "$PYTHON" -c 'import tilewright._host' 2>/dev/null && return
  local package=python/tilewright suffix
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  rm -rf "$package/lib" && mkdir "$package/lib" && tar xzf build/bundle/lib.tgz -C "$package/lib"
  local source objects=() compilers=()
  for source in csrc/host/module.cpp csrc/host/hls.cpp; do
    objects+=("build/bundle/$(basename "$source" .cpp).o")
    g++ -std=c++20 -O0 -fPIC -fvisibility=hidden -march=x86-64-v2 -Icsrc -Ihls/include \
      -I"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
      -I"$("$PYTHON" -c 'import pybind11; print(pybind11.get_include())')" -c "$source" -o "${objects[-1]}" &
    compilers+=($!)
  done
  wait "${compilers[@]}"
  g++ -shared -o "$package/_host$suffix" "${objects[@]}" build/bundle/host.a
  "$PYTHON" -c 'import tilewright._host'
}

files() { ls tests/cuda/test_*"$KERNELS"*.py; }

# The files run beside each other: most of their time is the oracles', on the CPU.
test_step() {
  for file in $(files); do
    name=$(basename "$file" .py)
    (timeout "$LIMIT" "$PYTHON" -m pytest -q --maxfail=8 -p no:cacheprovider -m "not repeat" -k "not emulator" "$file" \
      --junitxml="$OUT/$name.xml" > "$OUT/$name.log" 2>&1; echo $? > "$OUT/$name.status") &
  done
  wait
  for file in $(files); do
    name=$(basename "$file" .py)
    status=$(cat "$OUT/$name.status")
    rm "$OUT/$name.status"
    echo "$name: exit $status, $(tail -1 "$OUT/$name.log")"
    test "$status" = 0 || { failed=1; grep -E '^(E  |FAILED)' "$OUT/$name.log" | cut -c1-200 | head -12; }
  done
}

sanitize_step() {
  local tools="memcheck racecheck synccheck"
  for tool in $tools; do
    for file in $(files); do
      name=$(basename "$file" .py).$tool
      (timeout "$LIMIT" "$SANITIZER" --tool $tool --error-exitcode 9 --target-processes all \
        "$PYTHON" -m pytest -q -x -p no:cacheprovider -m sanitize -k "not emulator" "$file" > "$OUT/$name.log" 2>&1
        echo $? > "$OUT/$name.status") &
    done
  done
  wait
  for tool in $tools; do
    for file in $(files); do
      name=$(basename "$file" .py).$tool
      status=$(cat "$OUT/$name.status")
      rm "$OUT/$name.status"
      test "$status" = 5 && continue  # no test of this file is marked
      echo "$name: exit $status, $(grep -E 'passed|failed' "$OUT/$name.log" | tail -1), $(grep -E 'SUMMARY' "$OUT/$name.log" | tail -1)"
      test "$status" = 0 || { failed=1; grep -E '^=+ +(Error|Invalid|Race|Barrier|.*hazard)' "$OUT/$name.log" | sort | uniq -c | head -5; }
    done
  done
}

repeat_step() {
  timeout $((2 * LIMIT)) "$PYTHON" -m pytest -q -p no:cacheprovider -m repeat -k "not emulator" $(files) > "$OUT/repeat.log" 2>&1
  status=$?
  echo "repeat: exit $status, $(tail -1 "$OUT/repeat.log")"
  test $status = 0 || { failed=1; grep -E '^(E  |FAILED)' "$OUT/repeat.log" | head -12; }
}

bench_step() {
  "$PYTHON" -m bench.cuda.run --seconds "${BENCH_SECONDS:-30}" ${BENCH_OUTPUT:+--output "$BENCH_OUTPUT"} 2>&1 |
    tee "$OUT/bench.log" || failed=1
}

native || exit 1
for step in "${@:-test}"; do
  echo "== $step"
  "${step}_step"
done
exit $failed
