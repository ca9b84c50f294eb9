# SPDX-License-Identifier: Apache-2.0
"""What every file of the repository keeps to."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = {".py", ".cpp", ".h", ".cu", ".cuh", ".toml", ".sh", ".cmake"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|work|opt)/\w")


def tracked() -> list[Path]:
    """Files under version control, or all sources where this is no clone."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = [name for name in done.stdout.split("\0") if name]
    if not names:
        pytest.skip("not a git checkout: the list of files is unknown")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_every_source_file_states_its_licence():
    wanting = []
    for path in tracked():
        if path.suffix in CODE and path.stat().st_size and path.name != "pyproject.toml":
            first = path.read_text(encoding="utf-8").splitlines()[:2]
            if not any("SPDX-License-Identifier: Apache-2.0" in line for line in first):
                wanting.append(path.relative_to(ROOT))
    assert not wanting


def test_no_source_names_a_path_of_one_machine():
    found = []
    for path in tracked():
        if path.suffix in CODE | {".md", ".yml"}:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if MACHINE_PATH.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert re.search(r"^make test$", script.read_text(), flags=re.MULTILINE)
