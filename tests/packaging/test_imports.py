# SPDX-License-Identifier: Apache-2.0
"""Importing tilewright stays light: what is heavy or optional is imported where it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("transformers", "gguf", "safetensors", "rich", "typer", "matplotlib", "tokenizers", "accelerate")
ENTRIES = (
    "tilewright",
    "tilewright.ops",
    "tilewright.formats",
    "tilewright.nn",
    "tilewright.data",
    "tilewright.models",
    "tilewright.train",
    "tilewright.adapt",
)


def loaded_after(statement: str) -> set[str]:
    """Top-level modules present after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("entry", ENTRIES)
def test_importing_brings_no_optional_package(entry):
    assert loaded_after(f"import {entry}") & set(HEAVY) == set()


def test_the_package_itself_does_not_import_torch():
    assert "torch" not in loaded_after("import tilewright, tilewright.data")


def test_importing_reaches_no_network_and_starts_no_process():
    guard = (
        "import sys\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'subprocess.Popen', 'os.system'):\n"
        "        raise RuntimeError(event)\n"
        "import torch\n"
        "sys.addaudithook(hook)\n"
        "import tilewright.ops, tilewright.models, tilewright.data\n"
    )
    assert "tilewright" in loaded_after(guard)
