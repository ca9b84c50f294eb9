# SPDX-License-Identifier: Apache-2.0
"""What the accelerator's units take of an UltraScale+ FPGA, by Yosys: `synth_xilinx -family xcup`.

    python scripts/rtl_resources.py                  measure what has no number of its present sources
    python scripts/rtl_resources.py --all            measure everything again
    python scripts/rtl_resources.py --only fifo      measure these, whether they changed or not

The numbers go to python/tilewright/edge/tellme/synthesis.json, each with a hash of the sources it belongs to. They are
for comparing variants and for noticing growth; a vendor's tools count within some 20 % of them, and timing is not seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "rtl" / "src", ROOT / "rtl" / "syn" / "study")
NUMBERS = ROOT / "python" / "tilewright" / "edge" / "tellme" / "synthesis.json"


@dataclass(frozen=True)
class Unit:
    """A module at the accelerator's default parameters, (G, T, Q, P) = (3, 28, 16, 4) and 8 lanes among them, unless a
    study says otherwise. Where a module's own defaults are others, its parameters are named.

    Attributes:
        count: how many the accelerator holds that are in no other unit of the table; 0: a part or a study.
        quick: seconds, not minutes: measured again by every run of the tests.
        slang: read by the stricter of Yosys' two frontends, which takes imports in a module's head but loses ROMs.
        without: modules whose insides belong to other units.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    count: int = 0
    quick: bool = False
    module: str = ""
    slang: bool = False
    without: tuple[str, ...] = ()


LANES, PORT = {"Lanes": 8}, {"DataBits": 128}
UNITS: dict[str, Unit] = {
    "tlmm_core": Unit({"BeatsMax": 256, "BlocksMax": 49, "Banks": 2}, 1),
    "weight_buffer": Unit({}, 1),
    "weight_reader": Unit(PORT, 1),
    "weight_unpack": Unit({}, 1),
    "rms_max": Unit({"Lanes": 8, "RowBeatsMax": 512}, 1),
    "block_fifo": Unit({"Width": 129, "Depth": 512}, 1, quick=True),
    "quantize": Unit(LANES, 1),
    "gearbox to blocks": Unit({"In": 8, "Out": 84}, 1, module="gearbox"),
    "activation_store": Unit({}, 1, quick=True),
    "gearbox of sums": Unit({"In": 16, "Out": 8, "Width": 32}, 1, module="gearbox"),
    "dequant_fuse": Unit({"Lanes": 8, "HeadBeatsMax": 32}, 1),
    "attention": Unit({"Lanes": 8, "BeatsMax": 256}, 1),
    "axi_reader": Unit(PORT, 4, quick=True),
    "axi_writer": Unit(PORT, 1),
    "axi_read_arbiter": Unit({}, 1, quick=True),
    "row_commands": Unit({}, 5, quick=True),
    "axi_lite_registers": Unit({}, 1),
    "descriptor_unit": Unit(
        {"Lanes": 8, "RowBeatsMax": 512, "HeadBeatsMax": 32, "AttentionBeatsMax": 256}, 1, slang=True
    ),
    "accelerator, between its units": Unit(
        {}, 1, module="accelerator", slang=True,
        without=("tlmm_core", "weight_buffer", "weight_reader", "weight_unpack", "rms_max", "block_fifo", "quantize",
                 "activation_store", "gearbox", "dequant_fuse", "attention", "axi_reader", "axi_writer",
                 "axi_read_arbiter", "row_commands", "axi_lite_registers", "descriptor_unit"),
    ),
    "tl_precompute": Unit(),
    "tl_table_bank": Unit(quick=True),
    "adder_tree": Unit({"Depth": 5, "Width": 10}),
    "fuse_pair": Unit(),
    "attention_score": Unit(LANES),
    "attention_finish": Unit({"Lanes": 8, "BeatsMax": 256}),
    "divider": Unit(),
    "half_pack": Unit(),
    "fifo": Unit({"Width": 8, "Depth": 16}),
    "skid": Unit({"Width": 128}, quick=True),
}  # fmt: skip
LANE = {"T": 28, "G": 3}
STUDIES: dict[str, Unit] = {
    "look-up, select": Unit(LANE, module="study_select"),
    "look-up, half table": Unit(LANE, module="study_half_table"),
    "look-up, full table": Unit(LANE, quick=True, module="study_full_table"),
    "look-up, full table, G = 2": Unit({"T": 42, "G": 2}, module="study_full_table"),
    "look-up, full table, G = 4": Unit({"T": 21, "G": 4}, module="study_full_table"),
    "tables' sums, G = 2": Unit({"T": 42, "G": 2}, module="tl_precompute"),
    "tables' sums, G = 3": Unit({"T": 28, "G": 3}, module="tl_precompute"),
    "tables' sums, G = 4": Unit({"T": 21, "G": 4}, module="tl_precompute"),
    "a bank of weights": Unit({"Width": 144, "Words": 4096}, quick=True, module="study_bank"),
}

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
LUTRAM = {"RAM32M16": 8, "RAM64M8": 8, "RAM32M": 4, "RAM64M": 4, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4,
          "RAM256X1D": 8, "RAM64X1S": 1, "RAM32X1S": 1, "RAM128X1S": 2, "RAM256X1S": 4, "RAM512X1S": 8,
          "RAM32X16DR8": 8, "RAM64X8SW": 8}  # fmt: skip
"""Lookup tables that a distributed RAM takes."""
SYNTHESIS = "synth_xilinx -family xcup -top {top} -flatten -noiopad -noclkbuf -uram"
# A process of its own: Yosys ends the interpreter on an error.
DRIVER = """
import sys
from pyosys import libyosys
design = libyosys.Design()
for line in sys.stdin:
    libyosys.run_pass(line.strip(), design)
"""


def sources() -> dict[str, Path]:
    """Files by module."""
    return {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.sv"))}


def plain(path: Path) -> str:
    """A source without comments and spacing, neither of which makes a gate."""
    return " ".join(COMMENT.sub(" ", path.read_text(encoding="utf-8")).split())


def closure(module: str, without: Sequence[str] = ()) -> list[Path]:
    """The module and what it holds, packages first; of some modules not what they hold."""
    files, found, queue = sources(), set(), [module]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            held = set(re.findall(r"\w+", plain(files[name]))) & files.keys()
            queue += [other for other in held if name not in without or other.endswith("_pkg")]
    return [files[name] for name in sorted(found, key=lambda name: (not name.endswith("_pkg"), name))]


def source_hash(unit: Unit, name: str) -> str:
    """Of everything that the unit's numbers depend on but the tool."""
    texts = [plain(path) for path in closure(unit.module or name, unit.without)]
    return hashlib.sha256(json.dumps([texts, unit.parameters, unit.slang, SYNTHESIS]).encode()).hexdigest()[:16]


def counts(cells: dict[str, int]) -> dict[str, float]:
    """Resources of a netlist. A LUT of a distributed RAM or a shift register is a LUT too."""
    ram = sum(LUTRAM[name] * n for name, n in cells.items() if name in LUTRAM)
    shift = sum(n for name, n in cells.items() if name.startswith("SRL"))
    unknown = [name for name in cells if name.startswith("RAM") and name not in LUTRAM and not name.startswith("RAMB")]
    if unknown:
        raise ValueError(f"rtl_resources: how many LUTs does {unknown[0]} take? Add it to LUTRAM")
    logic = sum(n for name, n in cells.items() if re.fullmatch(r"LUT[1-6]", name))
    return {
        "lut": logic + ram + shift,
        "lutram": ram + shift,
        "ff": sum(n for name, n in cells.items() if re.fullmatch(r"FD[RSCP]E(_1)?", name)),
        "carry4": cells.get("CARRY4", 0),
        "dsp": cells.get("DSP48E2", 0),
        "bram": cells.get("RAMB36E2", 0) + cells.get("RAMB18E2", 0) / 2,
        "uram": cells.get("URAM288", 0),
    }


def measure(name: str, unit: Unit, timeout: float | None = None) -> dict[str, Any]:
    """Synthesise one unit."""
    top, source = unit.module or name, source_hash(unit, name)
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        result = folder / "stat.json"
        for path in closure(top):
            text = path.read_text(encoding="utf-8")
            # Yosys calls a ROM in lookup tables logic, and knows distributed RAM only.
            (folder / path.name).write_text(text.replace('rom_style = "distributed"', 'rom_style = "logic"'))
        files = " ".join(str(folder / path.name) for path in closure(top))
        sets = " ".join(f"-set {key} {value}" for key, value in unit.parameters.items())
        if unit.slang:
            sets = " ".join(f"-G {key}={value}" for key, value in unit.parameters.items())
            keep = "--keep-hierarchy" if unit.without else ""
            # An instance's module is called by its own name, a $ and its place.
            dark = [f"blackbox {module}$*" for module in unit.without]
            reads = [f"read_slang {keep} --top {top} {sets} {files}", *dark]
        else:
            reads = [f"read_verilog -sv {files}", *([f"chparam {sets} {top}"] if sets else [])]
        lines = [
            *reads,
            SYNTHESIS.format(top=top),
            f"tee -q -o {result} stat -json",
        ]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", DRIVER], input="\n".join(lines), capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip
        if done.returncode or not result.is_file():
            raise RuntimeError(f"rtl_resources: {name}: Yosys said\n{(done.stdout + done.stderr)[-2000:]}")
        cells = json.loads(result.read_text(encoding="utf-8"))["design"]["num_cells_by_type"]
    return {
        "module": top,
        "parameters": unit.parameters,
        "count": unit.count,
        **counts(cells),
        "source": source,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Measure what is asked for, and write after each unit, so that a break loses one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="everything again")
    parser.add_argument("--only", nargs="+", metavar="UNIT", default=[], help="these")
    asked = parser.parse_args()
    known = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.is_file() else {}
    for kind, table in (("units", UNITS), ("studies", STUDIES)):
        kept = {name: one for name, one in known.get(kind, {}).items() if name in table}
        for name, unit in table.items():
            stale = kept.get(name, {}).get("source") != source_hash(unit, name)
            if asked.all or name in asked.only or (stale and not asked.only):
                kept[name] = measure(name, unit)
                print(name, {key: value for key, value in kept[name].items() if key != "parameters"}, flush=True)
            elif name in kept:
                kept[name]["count"] = unit.count
            known[kind] = {one: kept[one] for one in table if one in kept}
            known["synthesis"] = f"Yosys (pyosys), {SYNTHESIS.format(top='...')}"
            NUMBERS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
