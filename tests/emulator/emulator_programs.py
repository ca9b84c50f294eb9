# SPDX-License-Identifier: Apache-2.0
"""Where the emulator's test program is."""

from __future__ import annotations

import functools
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NOT_BUILT = "emulator_tests was not built; run `make build`"


@functools.cache
def emulator_tests() -> Path | None:
    """The newest build of emulator_tests."""
    built = sorted(FOLDER.parents[1].glob("build/*/emulator_tests"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else None
