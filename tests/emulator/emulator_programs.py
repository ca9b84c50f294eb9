# SPDX-License-Identifier: Apache-2.0
"""Where the emulator's test programs are."""

from __future__ import annotations

import functools
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NOT_BUILT = "the emulator's test programs were not built; run `make build`"


@functools.cache
def newest_build(name: str) -> Path | None:
    built = sorted(FOLDER.parents[1].glob(f"build/*/{name}"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else None


def emulator_tests() -> Path | None:
    """Right and faulty kernels, and comparisons with CuTe's tables."""
    return newest_build("emulator_tests")


def emulator_wrappers() -> Path | None:
    """The GPU's test of every wrapper of csrc/hopper, for the emulator."""
    return newest_build("emulator_wrappers")
