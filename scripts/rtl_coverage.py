# SPDX-License-Identifier: Apache-2.0
"""Which lines of the RTL the benches run: line coverage a module, from Verilator's counters.

    python scripts/rtl_coverage.py              run the benches (tests/rtl, some minutes more than without), then report
    python scripts/rtl_coverage.py FOLDER       report what is in a folder already

Exit code 1 when a line of rtl/src never ran and is not waived below, or a waiver is for a line that ran.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "rtl" / "src"
BENCHES = sorted(
    path
    for path in (ROOT / "tests" / "rtl").glob("test_rtl_*.py")
    if path.stem not in ("test_rtl_formal", "test_rtl_mutation", "test_rtl_resources", "test_rtl_coverage")
)
ELABORATION = "works out constants, before anything runs"
WAIVED: dict[str, dict[str, str]] = {
    "axi_lite_registers": {"function automatic logic [31:0] writable": ELABORATION},
    "gearbox": {"function automatic integer gcd": ELABORATION},
}
"""Of a module: how a line begins, and why it cannot run. The first line of a function stands for all of it."""

RECORD = re.compile(r"^C '(?P<keys>.*)' (?P<count>\d+)$")

Lines = dict[str, dict[int, int]]
"""Of a module: how often a line ran, over all of its instances."""


def line_numbers(text: str) -> Iterable[int]:
    """Of `65-67,72`."""
    for piece in filter(None, text.split(",")):
        first, _, last = piece.partition("-")
        yield from range(int(first), int(last or first) + 1)


def read(files: Iterable[Path], folder: Path = SOURCES) -> Lines:
    """Counts of all runs together, of the sources in a folder."""
    counts: Lines = defaultdict(lambda: defaultdict(int))
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if found := RECORD.match(line):
                keys = dict(part.split("\x02", 1) for part in found["keys"].split("\x01") if "\x02" in part)
                path = Path(keys["f"])
                if path.parent == folder:
                    for number in line_numbers(keys.get("S", "")):
                        counts[path.stem][number] += int(found["count"])
    return counts


def with_functions(texts: list[str]) -> list[str]:
    """Each line, or the first of the function that it is in."""
    inside, out = "", []
    for text in map(str.strip, texts):
        inside = inside or (text if text.startswith("function") else "")
        out.append(inside or text)
        if text.startswith("endfunction"):
            inside = ""
    return out


def missed(
    lines: Lines, waived: Mapping[str, Mapping[str, str]], folder: Path = SOURCES
) -> tuple[list[str], list[str]]:
    """Lines that never ran, as `module:line: text`; and waivers that no such line needs."""
    unrun, unused = [], {(module, text) for module, texts in waived.items() for text in texts}
    for module, counts in sorted(lines.items()):
        texts = (folder / f"{module}.sv").read_text(encoding="utf-8").splitlines()
        heads = with_functions(texts)
        for number in sorted(number for number, count in counts.items() if count == 0):
            head = heads[number - 1]
            waiver = next((start for start in waived.get(module, {}) if head.startswith(start)), None)
            if waiver is None:
                unrun.append(f"{module}:{number}: {texts[number - 1].strip()}")
            else:
                unused.discard((module, waiver))
    return unrun, [f"{module}: {text}" for module, text in sorted(unused) if module in lines]


def main() -> None:
    """Run or read, print a table, say what is missing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else name)
        if len(sys.argv) < 2:
            environment = os.environ | {"TILEWRIGHT_RTL_COVERAGE": str(folder)}
            command = [sys.executable, "-m", "pytest", "-q", *map(str, BENCHES)]
            if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
                raise SystemExit("rtl_coverage: a bench failed")
        lines = read(sorted(folder.glob("*.dat")))
    unrun, unused = missed(lines, WAIVED)
    print(f"{'module':24}{'lines':>7}{'run':>7}{'waived':>8}")
    modules = sorted(path.stem for path in SOURCES.glob("*.sv"))
    for module in modules:
        counts = lines.get(module, {})
        zero = sum(count == 0 for count in counts.values())
        open_lines = sum(line.startswith(f"{module}:") for line in unrun)
        print(f"{module:24}{len(counts):7}{len(counts) - zero:7}{zero - open_lines:8}")
    for line in unrun:
        print(f"never ran: {line}", file=sys.stderr)
    for line in unused:
        print(f"waived, but it ran: {line}", file=sys.stderr)
    raise SystemExit(bool(unrun or unused))


if __name__ == "__main__":
    main()
