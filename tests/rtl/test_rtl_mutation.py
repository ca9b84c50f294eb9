# SPDX-License-Identifier: Apache-2.0
"""The benches notice: one line of a module is wrong in a copy, and a bench must fail on it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from simulate import SOURCES, run_bench
from test_rtl_descriptor import SMALL

CORE = {"G": 1, "T": 1, "Q": 1, "Banks": 2}


@dataclass(frozen=True)
class Mutant:
    """A line of a module, another in its place, and the bench that runs."""

    what: str
    module: str
    right: str
    wrong: str
    bench: str
    parameters: dict[str, int]


MUTANTS = [
    Mutant("sign of a weight", "tl_precompute", "2'd0: entry -= a;", "2'd0: entry += a;", "tlmm_core", CORE),
    Mutant("codes of no weights", "tl_table_bank", "store[row] = '0", "store[row] = '1", "tlmm_core", CORE),
    Mutant("gap between two visits", "tlmm_core", "_q == '0 ? 2'd2", "_q == '0 ? 2'd1", "tlmm_core", CORE),
    Mutant("flush at a frame's end", "gearbox", "count_q != '0)", "count_q > CountBits'(1))", "gearbox",
           {"In": 1, "Out": 3, "Width": 8}),
    Mutant("ties of int8", "quantize", "guard && (sticky || whole[0])", "guard", "quantize", {"Lanes": 1}),
    Mutant("ties of float16", "half_pack", "guard_q && (sticky_q || kept_q[0])", "guard_q", "half_pack",
           {"Width": 12, "ExponentBits": 6}),
    Mutant("shift of a row's factor", "row_factor", "4'(place - 16)", "4'(place - 17)", "row_factor", {}),
    Mutant("word of a wrapped vector", "weight_buffer", "word_q + WordBits'(bank < 32'(bank_q))", "word_q",
           "weight_buffer", {"Q": 6, "Vectors": 2, "Words": 10, "VectorBits": 7}),
    Mutant("row of the cache", "descriptor_unit", "capacity_i - 32'd1 - newest", "capacity_i - newest",
           "descriptor_unit", SMALL),
    Mutant("positions past the cache", "descriptor_unit", "first_i + tokens_i > capacity_i", "first_i >= capacity_i",
           "descriptor_unit", SMALL),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what.replace(" ", "-"))
def test_a_bench_fails_on_a_wrong_line(mutant: Mutant, tmp_path: Path):
    sources = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if path.stem == mutant.module:
            assert text.count(mutant.right) == 1
            path = tmp_path / path.name
            path.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
        sources.append(path)
    patterns = {"TILEWRIGHT_RTL_PATTERNS": "always half"}
    # What the line read may now be unused, which is a warning of its own.
    ran, failed = run_bench(
        mutant.bench, mutant.parameters, tmp_path / "build", patterns, sources=sources, options=["-Wno-fatal"]
    )
    assert 0 < failed <= ran
