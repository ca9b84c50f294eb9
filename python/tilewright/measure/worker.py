# SPDX-License-Identifier: Apache-2.0
"""The program that measures one runner: `worker SPEC.json RESULT.json`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from .protocol import Spec, measure

RUNNERS = {
    "torch": "torch_runner",
    "tilewright": "engine_runner",
    "llama.cpp": "llama_runner",
    "ik_llama.cpp": "ik_llama_runner",
}


def main() -> None:
    """Read the spec, measure, write the result."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    spec = Spec(**json.loads(source.read_text(encoding="utf-8")))
    module = importlib.import_module(f".{RUNNERS[spec.runner]}", __package__)
    target.write_text(json.dumps(measure(module.Runner, spec)), encoding="utf-8")


if __name__ == "__main__":
    main()
