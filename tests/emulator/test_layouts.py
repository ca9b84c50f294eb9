# SPDX-License-Identifier: Apache-2.0
"""The emulator's layouts and those of csrc/hopper against CuTe's layout algebra (cute_tables.cpp, layouts.cu)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
from emulator_programs import FOLDER, NOT_BUILT, emulator_tests

CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"


def cute_headers() -> Path | None:
    """Of the nvidia-cutlass wheel."""
    found = importlib.util.find_spec("cutlass_library")
    for folder in (found.submodule_search_locations or []) if found else []:
        headers = Path(folder) / "source" / "include"
        if (headers / "cute").is_dir():
            return headers
    return None


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    program, headers = emulator_tests(), cute_headers()
    if program is None:
        pytest.skip(NOT_BUILT)
    if headers is None:
        pytest.skip("CuTe is not here; pip install --no-deps nvidia-cutlass")
    if not (CUDA / "cuda_runtime.h").is_file():
        pytest.skip(f"CuTe needs CUDA's headers, and {CUDA} has none; set CUDA_HOME")
    folder = tmp_path_factory.mktemp("cute")
    writer, tables = folder / "cute_tables", folder / "tables.txt"
    includes = [f"-I{path}" for path in (headers, CUDA, CUDA / "cccl")]
    source = str(FOLDER / "cute_tables.cpp")
    subprocess.run(["g++", "-std=c++17", "-O0", "-w", *includes, source, "-o", str(writer)], check=True)
    tables.write_text(subprocess.run([str(writer)], capture_output=True, text=True, check=True).stdout)
    done = subprocess.run(
        [str(program), "layouts", str(tables)], capture_output=True, text=True, timeout=300, check=True
    )
    return {name: outcome for name, outcome, _ in (line.split("\t") for line in done.stdout.splitlines())}


@pytest.mark.slow
def test_products_of_operands_where_cute_puts_them(outcomes: dict[str, str]) -> None:
    products = {name: outcome for name, outcome in outcomes.items() if name.startswith("product")}
    assert len(products) == 16 + 32
    assert set(products.values()) == {"right"}, products


@pytest.mark.slow
def test_fragments_are_cutes(outcomes: dict[str, str]) -> None:
    fragments = {n: o for n, o in outcomes.items() if n.startswith(("registers", "mma.sync", "accumulators"))}
    assert len(fragments) == 4 + 5 + 4
    assert set(fragments.values()) == {"right"}, fragments


@pytest.mark.slow
def test_tiles_and_descriptors_of_the_wrappers_are_cutes(outcomes: dict[str, str]) -> None:
    tiles = {name: outcome for name, outcome in outcomes.items() if name.startswith(("tile", "descriptor"))}
    assert len(tiles) == 32
    assert set(tiles.values()) == {"right"}, tiles
