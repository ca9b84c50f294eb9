#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One binary for every supported torch: the wheel in dist/, as built, passes the operators' and the engine's tests beside
# another torch than the one it was built with.
#   scripts/test_wheel.sh [torch requirement]     default torch==2.10.0, the oldest supported: a download of gigabytes
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${1:-torch==2.10.0}
venv=.venv-${torch//[^0-9a-z.]/}
python=${PYTHON:-python3}
wheel=$(ls dist/tilewright-*.whl)
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q "pip>=25.1"
pip install -q "$torch"
pip install -q --group run --group test
pip install -q --force-reinstall --no-deps "$wheel"
"$venv/bin/python" -c 'import torch, tilewright.ops; print("torch", torch.__version__, "with", tilewright.ops.__file__)'
OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -q -p no:cacheprovider tests/formats tests/isa tests/ops tests/engine tests/nn
