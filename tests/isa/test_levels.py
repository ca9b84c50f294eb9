# SPDX-License-Identifier: Apache-2.0
"""Choosing an instruction-set level: by default, by variable, by call, and refusing what is not there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tilewright import _host, ops
from tilewright.testing import isa_level, isa_levels

assert ops


def run_with(level: str) -> subprocess.CompletedProcess[str]:
    code = "import torch, tilewright.ops; print(torch.ops.tilewright.set_isa(''))"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TILEWRIGHT_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )


def test_default_is_the_best_level_of_the_machine() -> None:
    assert torch.ops.tilewright.set_isa("") == os.environ.get("TILEWRIGHT_ISA", _host.isa_detected())


@pytest.mark.parametrize("level", isa_levels())
def test_variable_chooses_the_level(level: str) -> None:
    assert run_with(level).stdout.strip() == level


def test_unknown_level_in_the_variable_is_an_error_that_lists_the_levels() -> None:
    result = run_with("sse9")
    assert result.returncode != 0
    assert "sse9" in result.stderr
    assert "generic, avx2" in result.stderr


@pytest.mark.parametrize("level", isa_levels())
def test_call_chooses_and_the_block_ends(level: str) -> None:
    with isa_level(level):
        assert torch.ops.tilewright.set_isa(level) == level
    assert torch.ops.tilewright.set_isa("") == os.environ.get("TILEWRIGHT_ISA", _host.isa_detected())
