# SPDX-License-Identifier: Apache-2.0
# The two commands that matter: `make demo` and `make test`. Everything they need goes into .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: build demo test lint format sanitize bench peers wheel clean help

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1  /p' Makefile | expand -t 12

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q "pip>=25.1"
	$(PIP) install -q "$(TORCH)"
	$(PIP) install -q --group dev "transformers>=5" accelerate "safetensors>=0.5" "gguf>=0.17" "typer>=0.15" "rich>=13" \
	  "matplotlib>=3.8" "psutil>=5.9"
	touch $@

build: $(VENV)/.ready  ## compile the native code and install the package, editable, into .venv
	flock $(VENV)/build.lock $(PIP) install -q --no-build-isolation --no-deps -e .

demo: build  ## the main job on a real model: reports/demo.{json,md,png}
	$(BIN)/tw demo

lint: $(VENV)/.ready  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.ready  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format -i

test: build lint  ## what CI runs
	$(ONE_THREAD) $(BIN)/python -m pytest -q

wheel: $(VENV)/.ready  ## dist/tilewright-*.whl
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .

clean:  ## remove what the build made
	rm -rf build dist
