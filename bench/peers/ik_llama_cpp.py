# SPDX-License-Identifier: Apache-2.0
"""ik_llama.cpp: the same GGUF file, and rewritten in the row-interleaved 4-bit form that is its fastest on a CPU."""

from __future__ import annotations

from pathlib import Path

from tilewright.measure.launch import Method, environments_with, why_absent

RUNNER = "ik_llama.cpp"
FASTEST = "Q4_0_R8"


def available() -> str | None:
    """Why ik_llama.cpp cannot be measured here, or None."""
    return why_absent(RUNNER)


def methods(gguf: Path) -> dict[str, Method]:
    """The file as it is and in the fastest form, for each environment."""
    found = {}
    for python in environments_with(RUNNER):
        build = " (native build)" if "native" in str(python) else ""
        found[RUNNER + build] = Method(RUNNER, str(gguf), {}, python)
        found[f"{RUNNER} {FASTEST}{build}"] = Method(RUNNER, str(gguf), {"form": FASTEST}, python)
    return found
