# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernels keep to what their rooms ask: no local memory, the wanted instruction, few registers."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from tilewright import _native

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "cuda_kernels.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_build_keeps_every_rule(script: ModuleType) -> None:
    library = _native._folder() / "libtilewright_cuda.so"
    if not library.is_file():
        pytest.skip("built without nvcc, so without CUDA kernels")
    assert script.broken(script.kernels(library), script.rules(), script.recorded_launches()) == []


def test_a_broken_rule_is_found(script: ModuleType) -> None:
    kernel = script.Kernel("s", "room<1>", registers=200, local=16, instructions=Counter({"FFMA": 3, "LDL": 2}))
    asked = [{"match": "room", "instruction": "HGMMA", "registers": 168, "blocks": 3}, {"match": "gone"}]
    launched = {"room<1>": [{"threads": 128, "shared": 100 * 1024, "cluster": 1}]}
    problems = script.broken([kernel], asked, launched)
    assert [text.split(" ", 1)[1] for text in problems] == [
        "has no HGMMA",
        "uses 200 registers, at most 168 are allowed",
        "fits 2 times on a multiprocessor, 3 are wanted",
        "kernel matches 'gone'",
        "uses 16 bytes of local memory (2 accesses)",
    ]
    assert script.broken([kernel], [{"match": "room", "local": True}], launched) == []


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 1024, 0, 2),  # threads of a multiprocessor
        (168, 384, 0, 1),  # registers: 12 warps of 5376
        (64, 128, 0, 8),  # registers
        (16, 64, 0, 32),  # blocks
        (16, 64, 113 * 1024, 2),  # shared memory beside a kilobyte a block
        (16, 64, 114 * 1024, 1),
    ],
)
def test_occupancy_is_what_runs_out_first(script: ModuleType, registers: int, threads: int, shared: int, blocks: int):
    kernel = script.Kernel("s", "room<1>", registers=registers)
    assert script.occupancy(kernel, {"threads": threads, "shared": shared, "cluster": 1}) == blocks


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        (
            "void tilewright::room::cuda::(anonymous namespace)::run<(tilewright::hopper::Swizzle)128, 4>(P<int>)",
            "room::run<128, 4>",
        ),
        ("tilewright::plain(tilewright::Params)", "plain"),
    ],
)
def test_names_are_short(script: ModuleType, demangled: str, name: str) -> None:
    assert script.short(demangled) == name
