# SPDX-License-Identifier: Apache-2.0
"""`tw doctor`: the report of `tilewright.doctor`, as a table or JSON."""

from __future__ import annotations

from typing import Any

import typer

from tilewright.cli.codes import ExitCode
from tilewright.cli.shared import Json, console, print_json


def doctor(as_json: Json = False) -> None:
    """Say what this installation can use: torch, instruction set, native libraries, CUDA, packages, data.

    Exit code 1 when something keeps tilewright from working.
    """
    from tilewright.doctor import report

    found = report()
    if as_json:
        print_json(found)
    else:
        _print(found)
    if found["problems"]:
        raise typer.Exit(ExitCode.FAILED)


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as (what, state) lines."""
    torch, isa = found["torch"], found["isa"]
    cuda = ", ".join(torch["devices"]) if torch["cuda_available"] else "no device"
    lines = [
        ("tilewright", f"{found['tilewright']} on Python {found['python']}"),
        ("processor", f"{found['processor']}, {found['cores']} cores"),
        ("torch", f"{torch['version']}, {torch['threads']} threads, C++11 ABI {'yes' if torch['cxx11_abi'] else 'no'}"),
        ("CUDA", f"torch built for {torch['cuda_built'] or 'CPU only'}; {cuda}"),
        ("instructions", isa.get("reason") or f"{isa['active']} in use, {isa['detected']} detected"),
        ("compiler", found["build"].get("compiler") or found["build"]["reason"]),
    ]
    for name, library in found["libraries"].items():
        lines.append((f"{name} operators", str(library["path"]) if library["loaded"] else library["reason"]))
    for name, package in found["packages"].items():
        lines.append((name, package["version"] or f"absent; needed to {package['for']}"))
    lines += [(name, reason or "installed") for name, reason in found["peers"].items()]
    lines.append(("cache", found["data"]["cache"]))
    for name in ("smollm2", "encyclopedia"):
        lines.append((name, found["data"][name]["path"] or found["data"][name]["reason"]))
    return lines


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, state in rows(found):
        table.add_row(what, Text(state))
    out = console()
    out.print(table)
    for problem in found["problems"]:
        out.print(Text(f"problem: {problem}", style="bold red"))
    if not found["problems"]:
        out.print(Text("Everything needed is here.", style="green"))
