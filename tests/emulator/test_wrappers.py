# SPDX-License-Identifier: Apache-2.0
"""Each wrapper of csrc/hopper in the emulator, by its test for a GPU (tests/cuda/hopper_wrappers.cu)."""

from __future__ import annotations

import subprocess

import pytest
from emulator_programs import NOT_BUILT, emulator_wrappers


@pytest.mark.skipif(emulator_wrappers() is None, reason=NOT_BUILT)
def test_every_wrapper_computes_what_its_plain_form_does_in_the_emulator() -> None:
    done = subprocess.run([str(emulator_wrappers())], capture_output=True, text=True, timeout=300, check=False)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert sum(line.startswith("pass") for line in lines) > 100, done.stdout + done.stderr
    assert done.returncode == 0
