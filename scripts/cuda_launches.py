# SPDX-License-Identifier: Apache-2.0
"""How the CUDA kernels are launched, noted by the emulator while the device tests run: threads, shared memory, cluster.

    python scripts/cuda_launches.py        rewrite docs/reference/cuda-launches.json

The numbers are those of the host code that launches on a GPU too: the emulator runs the same sources. A kernel that no
test starts has no entry. `scripts/cuda_kernels.py` makes occupancy from them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "reference" / "cuda-launches.json"
VARIABLE = "TILEWRIGHT_EMULATOR_LAUNCHES"


def names_by_place(library: Path) -> dict[int, str]:
    """Every function of a library, demangled, by its address."""
    text = subprocess.run(
        ["nm", "--demangle", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in text.splitlines():
        place, kind, name = line.split(" ", 2)
        if kind in "tTwW":
            found[int(place, 16)] = name
    return found


def with_symbols(library: Path) -> Path:
    """The library as it was linked: installation may have stripped the one that ran."""
    built = sorted((ROOT / "build").glob(f"cp*/{library.name}"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else library


def launches(notes: str, short: dict[str, dict[int, str]]) -> dict[str, list[dict[str, int]]]:
    """Shapes of blocks by kernel, each kernel's most shared memory last."""
    found = defaultdict(set)
    for line in notes.splitlines():
        library, place, threads, shared, cluster = line.rsplit(" ", 4)
        found[short[library][int(place, 16)]].add((int(shared), int(threads), int(cluster)))
    return {
        name: [
            {"threads": threads, "shared": shared, "cluster": cluster} for shared, threads, cluster in sorted(shapes)
        ]
        for name, shapes in sorted(found.items())
    }


def main() -> None:
    """Run the device tests in the emulator and keep what they started."""
    from cuda_kernels import short

    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "launches"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/cuda", "tests/emulator"]
        environment = os.environ | {VARIABLE: str(notes), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        text = notes.read_text(encoding="utf-8")
    libraries = {line.rsplit(" ", 4)[0] for line in text.splitlines()}
    names = {
        path: {place: short(name) for place, name in names_by_place(with_symbols(Path(path))).items()}
        for path in libraries
        if path.endswith("libtilewright_emulator.so")
    }
    ours = "\n".join(line for line in text.splitlines() if line.rsplit(" ", 4)[0] in names)
    FILE.write_text(json.dumps(launches(ours, names), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
