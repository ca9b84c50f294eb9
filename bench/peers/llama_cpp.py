# SPDX-License-Identifier: Apache-2.0
"""llama.cpp on the same GGUF file, in every peers environment that has it."""

from __future__ import annotations

from pathlib import Path

from tilewright.measure.launch import Method, environments_with, why_absent

RUNNER = "llama.cpp"


def available() -> str | None:
    """Why llama.cpp cannot be measured here, or None."""
    return why_absent(RUNNER)


def methods(gguf: Path) -> dict[str, Method]:
    """One method for each environment; one compiled on this machine is called native."""
    return {
        RUNNER + (" (native build)" if "native" in str(python) else ""): Method(RUNNER, str(gguf), {}, python)
        for python in environments_with(RUNNER)
    }
