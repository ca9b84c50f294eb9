# SPDX-License-Identifier: Apache-2.0
"""Start a worker in a process of its own, in the environment that has its libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
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
OWN = ("torch", "tilewright")
_HERE = Path(__file__).resolve().parent
# Appended, never put first: tilewright has modules with the names of standard ones (`inspect`).
_BOOTSTRAP = "import sys; sys.path.append({folder!r}); from measure.worker import main; main()"
_PROBE = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n)))"


@dataclass(frozen=True)
class Method:
    """A way of running a model: the runner, the file or folder it reads, its options, and where it is installed."""

    runner: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    python: Path | None = None


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


def environments_with(runner: str) -> list[Path]:
    """The interpreters that can run `runner`, preferred first; torch and tilewright are looked for in this one only."""
    names = PACKAGES[runner]
    places = [Path(sys.executable)] if runner in OWN else peer_environments()
    have = {python: installed(python, names) for python in places}
    return [python for python in places if (have[python] if runner in ANY_OF else have[python] == set(names))]


def why_absent(runner: str) -> str | None:
    """One line why `runner` cannot be measured here, or None when it can."""
    if environments_with(runner):
        return None
    names = " or ".join(PACKAGES[runner]) if runner in ANY_OF else ", ".join(PACKAGES[runner])
    way = "pip install 'tilewright[all]'" if runner in OWN else "make peers"
    return f"{names} not installed; {way}"


def run(spec: Spec, python: Path | None = None, timeout: float | None = None) -> dict[str, Any]:
    """Measure `spec` in a fresh process and return what the worker found.

    Raises `ModuleNotFoundError` when no environment has the runner's packages, `MeasureError` when the worker fails.
    """
    found = [python] if python else environments_with(spec.runner)
    if not found:
        raise ModuleNotFoundError(f"{spec.runner}: {why_absent(spec.runner)}", name=PACKAGES[spec.runner][-1])
    chosen = found[0]
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
