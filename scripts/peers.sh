#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Other projects' engines, each environment apart from tilewright's, so that benches can compare in one run.
#   scripts/peers.sh            prebuilt wheels (llama.cpp and ik_llama.cpp, both compiled for AVX2) into .venv-peers,
#                               and flash-linear-attention, of whose operators the torch forms run on a CPU
#   scripts/peers.sh --native   the same two compiled for this machine, into .venv-peers-native (about half an hour on two cores)
# Where both exist, the native one is preferred.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

install() { "$1/bin/python" -m pip --disable-pip-version-check install --quiet "${@:2}"; }

if [[ "${1:-}" == "--native" ]]; then
  venv=.venv-peers-native
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  install "$venv" numpy cmake ninja
  export PATH="$PWD/$venv/bin:$PATH" CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)}
  CMAKE_ARGS="-DGGML_NATIVE=ON" install "$venv" --no-binary llama-cpp-python "llama-cpp-python==0.3.36"
  CMAKE_ARGS="-DGGML_NATIVE=ON" install "$venv" --no-binary ik-llama-cpp-python "ik-llama-cpp-python==0.1.5"
else
  venv=.venv-peers
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  install "$venv" numpy
  for package in "xllamacpp==2026.10.11549" "ik-llama-cpp-python==0.1.5"; do
    install "$venv" --no-deps --only-binary :all: "$package" || echo "peers: no wheel of $package for this Python; left out" >&2
  done
  install "$venv" --no-deps "fla-core==0.6.0" "einops==0.8.2" || echo "peers: no flash-linear-attention; left out" >&2
fi
"$venv/bin/python" -m pip --disable-pip-version-check list 2>/dev/null | grep -iE 'llama' || true
