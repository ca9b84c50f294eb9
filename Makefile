# SPDX-License-Identifier: Apache-2.0
# The two commands that matter: `make demo` and `make test`. Everything they need goes into .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two threads beside other work are far slower than one; kernels' thread counts are varied inside the tests.
ONE_THREAD := OMP_NUM_THREADS=1
CXX_SOURCES := git ls-files '*.h' '*.cpp' '*.cu' '*.cuh'

.PHONY: help build demo test lint format sanitize bench test-gpu bench-gpu gpu-bundle peers wheel test-wheel clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1  /p' Makefile | expand -t 12

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q "pip>=25.1"
	$(PIP) install -q "$(TORCH)"
	$(PIP) install -q --group dev
	$(PIP) install -q --no-deps nvidia-cutlass  # headers for the emulator's tests, without what its Python part wants
	touch $@

build: $(VENV)/.ready  ## compile the native code and install the package, editable, into .venv
	flock $(VENV)/build.lock $(PIP) install -q --no-build-isolation --no-deps -e .

demo: build  ## the main job on a real model: reports/demo.{json,md,png}
	$(BIN)/tw demo

lint: $(VENV)/.ready  ## ruff, mypy, clang-format, verilator
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CXX_SOURCES) | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python scripts/rtl_lint.py

format: $(VENV)/.ready  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .
	$(CXX_SOURCES) | xargs $(BIN)/clang-format -i

test: build lint  ## what CI runs
	$(BIN)/tw fetch
	$(ONE_THREAD) $(BIN)/python -m pytest -q
	$(BIN)/tw reproduce --all --quick

sanitize: build  ## the kernels' tests under the address and undefined-behaviour sanitizers
	scripts/sanitize.sh

bench: build  ## benchmarks against whatever peers are installed: bench/results, docs/benchmarks.md
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.report

test-gpu:  ## on a machine with a GPU: tests, compute-sanitizer, repeated runs (PYTHON: its interpreter with torch)
	PYTHON=$(PYTHON) scripts/gpu.sh test sanitize repeat

bench-gpu:  ## on a machine with a GPU: benchmarks against the peers that are installed there
	PYTHON=$(PYTHON) scripts/gpu.sh bench
	$(PYTHON) -m bench.cuda.report

gpu-bundle: $(VENV)/.ready  ## build/bundle: the native libraries for a GPU machine that does not build them itself
	scripts/gpu_bundle.sh

peers:  ## llama.cpp and ik_llama.cpp in an environment of their own
	PYTHON=$(PYTHON) scripts/peers.sh

wheel: $(VENV)/.ready  ## dist/tilewright-*.whl
	rm -rf dist
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .

test-wheel: wheel  ## the wheel, installed beside the oldest supported torch (a large download), passes the tests
	scripts/test_wheel.sh

clean:  ## remove what the build made
	rm -rf build dist
