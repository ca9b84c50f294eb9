# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of the CUDA kernels, read without a GPU from the library's disassembly.

    python scripts/cuda_kernels.py            print the table
    python scripts/cuda_kernels.py --write    put it into docs/reference/cuda-kernels.md
    python scripts/cuda_kernels.py --check    exit code 1 where a kernel breaks its room's kernels.toml

A room's `cuda/kernels.toml` says what its kernels must be made of: `[[kernel]]` tables with `match`, a regular
expression over the demangled name, and any of `instruction` (must occur), `registers` (at most), `blocks` (of a
multiprocessor, at least), `local = true` (may use local memory; the reason stands in a comment). Every kernel, listed
or not, must otherwise use no local memory. How kernels are launched comes from `docs/reference/cuda-launches.json`
(`scripts/cuda_launches.py`); what their benchmarks must at least move and compute from `bench/cuda`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench
PAGE = ROOT / "docs" / "reference" / "cuda-kernels.md"
BEGIN, END = "<!-- begin generated: {} -->", "<!-- end generated: {} -->"
MATRIX = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "IDP", "FFMA", "DFMA")
COPIES = ("UTMALDG", "UBLKCP", "LDGSTS")
LAUNCHES = ROOT / "docs" / "reference" / "cuda-launches.json"
# A multiprocessor of compute capability 9.0: the CUDA programming guide's table of technical specifications.
REGISTERS, THREADS, BLOCKS, SHARED_BYTES, SHARED_OF_A_BLOCK = 65536, 2048, 32, 228 * 1024, 1024
# NVIDIA's data sheet of the H100 SXM5, dense: bytes and operations a second.
DATA_SHEET = {"bytes": 3.35e12, "bf16": 989.4e12, "fp8": 1978.9e12, "int8": 1978.9e12}


@dataclass
class Kernel:
    """One compiled kernel: registers a thread, bytes of local and of static shared memory, instructions by mnemonic."""

    symbol: str
    name: str
    registers: int = 0
    local: int = 0
    shared: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def spills(self) -> int:
        """Instructions that read or write local memory."""
        return self.instructions["LDL"] + self.instructions["STL"]


def tool(name: str) -> str:
    """A program of the CUDA toolkit, or of the wheel that carries it."""
    found = shutil.which(name) or next(
        (str(p) for p in Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/*/bin/{name}")), None
    )
    if found is None:
        raise SystemExit(f"{name} is not here; install the nvidia-cuda-{name} package or a CUDA toolkit")
    return found


def run(*command: str, given: str | None = None) -> str:
    """Standard output of a program that must succeed; the disassembler is looked for beside the dumper."""
    path = f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True, env={"PATH": path}).stdout


def short(demangled: str) -> str:
    """The kernel's room and name with its template arguments, without parameters and the namespaces all share."""
    text = re.sub(r"\(anonymous namespace\)::|tilewright::|hopper::|cuda::", "", demangled)
    depth, end = 0, len(text)
    for i, letter in enumerate(text):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and text[:i].strip():
            end = i
            break
    text = text[:end].removeprefix("void ").strip()
    return re.sub(r"\((?:\w+::)*\w+\)", "", text)  # casts of enumerators in template arguments


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of a library for sm_90a."""
    found: dict[str, Kernel] = {}
    usage = run(tool("cuobjdump"), "--dump-resource-usage", str(library))
    for symbol, resources in re.findall(r"Function (\S+):\n\s+(REG:.*)", usage):
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources)}
        found[symbol] = Kernel(symbol, symbol, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], numbers["SHARED"])
    current: Kernel | None = None
    for text in run(tool("cuobjdump"), "--dump-sass", str(library)).splitlines():
        if match := re.search(r"Function : (\S+)", text):
            current = found[match[1]]
        elif current and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", text)):
            current.instructions[match[1]] += 1
    names = run("c++filt", given="\n".join(found)).splitlines()
    for kernel, name in zip(found.values(), names, strict=True):
        kernel.name = short(name)
    return sorted(found.values(), key=lambda kernel: kernel.name)


def occupancy(kernel: Kernel, launch: dict[str, int]) -> int:
    """Blocks of a launch that one multiprocessor holds at a time.

    Registers are handed out by the warp in units of 256, shared memory by the block beside what the system keeps.
    """
    warps = -(-launch["threads"] // 32)
    registers = warps * -(-kernel.registers * 32 // 256) * 256
    shared = kernel.shared + launch["shared"] + SHARED_OF_A_BLOCK
    return min(REGISTERS // registers, SHARED_BYTES // shared, THREADS // (32 * warps), BLOCKS)


def recorded_launches() -> dict[str, list[dict[str, int]]]:
    """How each kernel is launched, by its short name."""
    return dict(json.loads(LAUNCHES.read_text(encoding="utf-8")))


def floors() -> str:
    """The benchmarks' cases as a Markdown table: least bytes, operations, and the time that a data sheet allows."""
    lines = ["| case | bytes | operations | floor | bound by |", "|---|---:|---:|---:|---|"]
    for path in sorted((ROOT / "bench" / "cuda").glob("*.py")):
        module = importlib.import_module(f"bench.cuda.{path.stem}")
        for case in module.cases() if hasattr(module, "cases") else []:
            moving, computing = case.bytes / DATA_SHEET["bytes"], case.operations / DATA_SHEET[case.peak]
            bound = case.peak if computing > moving else "bytes"
            lines.append(
                f"| {case.name} | {case.bytes / 1e6:.4g} MB | {case.operations / 1e9:.4g} G "
                f"| {1e6 * max(moving, computing):.3g} us | {bound} |"
            )
    return "\n".join(lines) + "\n"


def rules() -> list[dict[str, Any]]:
    """What the rooms ask of their kernels."""
    import tomllib

    tables = [
        tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("csrc/ops/*/cuda/kernels.toml"))
    ]
    return [rule for table in tables for rule in table["kernel"]]


def broken(found: list[Kernel], asked: list[dict[str, Any]], launched: dict[str, list[dict[str, int]]]) -> list[str]:
    """Every rule that a kernel breaks, in words."""
    problems = []
    for rule in asked:
        matched = [kernel for kernel in found if re.search(rule["match"], kernel.name)]
        if not matched:
            problems.append(f"no kernel matches {rule['match']!r}")
        for kernel in matched:
            wanted, most, blocks = rule.get("instruction"), rule.get("registers"), rule.get("blocks")
            held = [occupancy(kernel, launch) for launch in launched.get(kernel.name, [])]
            if wanted and not kernel.instructions[wanted]:
                problems.append(f"{kernel.name} has no {wanted}")
            if most and kernel.registers > most:
                problems.append(f"{kernel.name} uses {kernel.registers} registers, at most {most} are allowed")
            if blocks and held and min(held) < blocks:
                problems.append(f"{kernel.name} fits {min(held)} times on a multiprocessor, {blocks} are wanted")
    allowed = [rule["match"] for rule in asked if rule.get("local")]
    for kernel in found:
        if (kernel.local or kernel.spills) and not any(re.search(match, kernel.name) for match in allowed):
            problems.append(f"{kernel.name} uses {kernel.local} bytes of local memory ({kernel.spills} accesses)")
    return problems


def span(values: list[int]) -> str:
    """One number, or the least and the most."""
    return "" if not values else f"{values[0]}" if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def table(found: list[Kernel], launched: dict[str, list[dict[str, int]]]) -> str:
    """The Markdown table."""
    lines = [
        "| kernel | registers | local bytes | threads | shared bytes | blocks an SM | matrix instructions | copies "
        "| instructions |",
        "|---|---:|---:|---:|---:|---:|---|---|---:|",
    ]
    for kernel in found:
        products = ", ".join(f"{name} {kernel.instructions[name]}" for name in MATRIX if kernel.instructions[name])
        copies = ", ".join(f"{name} {kernel.instructions[name]}" for name in COPIES if kernel.instructions[name])
        ways = launched.get(kernel.name, [])
        threads = span([way["threads"] for way in ways])
        shared = span([kernel.shared + way["shared"] for way in ways])
        blocks = span([occupancy(kernel, way) for way in ways])
        lines.append(
            f"| `{kernel.name}` | {kernel.registers} | {kernel.local} | {threads} | {shared} | {blocks} | {products} "
            f"| {copies} | {sum(kernel.instructions.values())} |"
        )
    return "\n".join(lines) + "\n"


def library() -> Path:
    """The CUDA library of the installed package."""
    from tilewright import _native

    return _native._folder() / "libtilewright_cuda.so"


def replaced(page: str, block: str, text: str) -> str:
    """The page with other text between a block's two marks."""
    begin, end = BEGIN.format(block), END.format(block)
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, help="libtilewright_cuda.so; the installed package's when not given")
    parser.add_argument("--write", action="store_true", help="put the table into the documentation")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a rule is broken")
    options = parser.parse_args()
    found = kernels(options.library or library())
    launched = recorded_launches()
    if options.write:
        text = replaced(PAGE.read_text(encoding="utf-8"), "cuda kernels", table(found, launched))
        PAGE.write_text(replaced(text, "floors", floors()), encoding="utf-8")
    else:
        print(table(found, launched), end="")
    problems = broken(found, rules(), launched) if options.check else []
    for problem in problems:
        print(f"cuda_kernels: {problem}", file=sys.stderr)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
