# SPDX-License-Identifier: Apache-2.0
"""A level's object files export no inline function that the linker could pick for code of a lower level."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = sorted(ROOT.glob("build/cp*/CMakeFiles/*/csrc/**/avx*.cpp.o"))


@pytest.mark.skipif(not OBJECTS, reason="no build tree here: the package was installed from a wheel")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: "/".join(p.parts[-3:]))
def test_no_weak_functions(path: Path) -> None:
    listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    assert " T " in listing or " D " in listing or " R " in listing, "the object defines nothing"
    weak = [line for line in listing.splitlines() if " W " in line]
    assert not weak
