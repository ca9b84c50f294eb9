# SPDX-License-Identifier: Apache-2.0
"""Start a worker in a process of its own, in the environment that has its libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tilewright.measure.protocol import Spec

PEERS_VARIABLE = "TILEWRIGHT_PEERS"
PACKAGES = {
    "torch": ("transformers", "accelerate", "gguf"),
    "tilewright": ("gguf",),
    "llama.cpp": ("llama_cpp", "xllamacpp"),
    "ik_llama.cpp": ("ik_llama_cpp",),
}
ANY_OF = {"llama.cpp"}
_HERE = Path(__file__).resolve().parent
# Appended, never put first: tilewright has modules with the names of standard ones (`inspect`).
_BOOTSTRAP = "import sys; sys.path.append({folder!r}); from measure.worker import main; main()"
_PROBE = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n)))"


class MeasureError(RuntimeError):
    """A worker ended without a result; the message holds its last words."""


def peer_environments() -> list[Path]:
    """Interpreters that may hold peers: `TILEWRIGHT_PEERS` (folders) or the checkout's `.venv-peers*`; this one."""
    named = os.environ.get(PEERS_VARIABLE)
    folders = (
        [Path(name) for name in named.split(os.pathsep)]
        if named
        else sorted(_HERE.parents[2].glob(".venv-peers*"), reverse=True)
    )
    found = [folder / "bin" / "python" for folder in folders]
    return [path for path in found if path.exists()] + [Path(sys.executable)]


@cache
def installed(python: Path, names: tuple[str, ...]) -> frozenset[str]:
    """Which of the packages an interpreter can import."""
    done = subprocess.run([str(python), "-c", _PROBE, *names], capture_output=True, text=True, check=False)
    return frozenset(done.stdout.split())


def find_environment(runner: str) -> Path | None:
    """The interpreter to run `runner` with, always this one for torch and tilewright; None when there is none."""
    names = PACKAGES[runner]
    places = [Path(sys.executable)] if runner in ("torch", "tilewright") else peer_environments()
    for python in places:
        have = installed(python, names)
        if have if runner in ANY_OF else have == set(names):
            return python
    return None


def why_absent(runner: str) -> str | None:
    """One line why `runner` cannot be measured here, or None when it can."""
    if find_environment(runner) is not None:
        return None
    names = " or ".join(PACKAGES[runner]) if runner in ANY_OF else ", ".join(PACKAGES[runner])
    way = "pip install 'tilewright[all]'" if runner in ("torch", "tilewright") else "make peers"
    return f"{names} not installed; {way}"


def run(spec: Spec, python: Path | None = None, timeout: float | None = None) -> dict[str, Any]:
    """Measure `spec` in a fresh process and return what the worker found.

    Raises `ModuleNotFoundError` when no environment has the runner's packages, `MeasureError` when the worker fails.
    """
    chosen = python or find_environment(spec.runner)
    if chosen is None:
        raise ModuleNotFoundError(f"{spec.runner}: {why_absent(spec.runner)}", name=PACKAGES[spec.runner][-1])
    environment = os.environ | {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "spec.json", Path(folder) / "result.json"
        source.write_text(json.dumps(spec.to_dict()), encoding="utf-8")
        code = _BOOTSTRAP.format(folder=str(_HERE.parent))
        program = ["-m", "tilewright.measure.worker"] if chosen == Path(sys.executable) else ["-c", code]
        command = [str(chosen), *program, str(source), str(target)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=timeout, check=False
        )
        if done.returncode != 0 or not target.is_file():
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise MeasureError(f"{spec.runner} ended with code {done.returncode}: {' '.join(last) or 'no message'}")
        return dict(json.loads(target.read_text(encoding="utf-8")))
