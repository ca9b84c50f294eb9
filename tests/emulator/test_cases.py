# SPDX-License-Identifier: Apache-2.0
"""Kernels with a fault each, of which the emulator must catch every one, and the same kernels without (*.cu)."""

from __future__ import annotations

import functools
import re
import subprocess

import pytest
from emulator_programs import FOLDER, NOT_BUILT, emulator_tests

SEEDS = (0, 1, 2)
# An error says where it happened, unless all threads wait or the launch itself was wrong.
PLACE = r"block \(\d+, \d+, \d+\), thread \d+|deadlock|more bytes came|tensor map|clusters of|a block of|a block has"
NAMES = [
    name
    for source in sorted(FOLDER.glob("*.cu"))
    for name in re.findall(r'^      \{"([^"]+)",', source.read_text(), flags=re.MULTILINE)
]


@functools.cache
def _outcomes(seed: int) -> dict[str, tuple[str, str]]:
    program = emulator_tests()
    assert program is not None
    done = subprocess.run([str(program), str(seed)], capture_output=True, text=True, timeout=300, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: (outcome, message) for name, outcome, message in rows}


@pytest.mark.skipif(emulator_tests() is None, reason=NOT_BUILT)
@pytest.mark.parametrize("name", NAMES)
def test_faults_are_caught_and_right_kernels_pass(name: str) -> None:
    for seed in SEEDS:
        outcome, message = _outcomes(seed)[name]
        assert outcome in ("right", "caught"), f"seed {seed}: {outcome}: {message}"
        if outcome == "caught":
            assert re.search(PLACE, message), message


@pytest.mark.skipif(emulator_tests() is None, reason=NOT_BUILT)
def test_every_case_of_the_program_is_listed() -> None:
    assert sorted(_outcomes(0)) == sorted(NAMES)
    outcomes = [outcome for outcome, _ in _outcomes(0).values()]
    assert outcomes.count("caught") >= 70
    assert outcomes.count("right") >= 20
