# SPDX-License-Identifier: Apache-2.0
"""`tw bench`: the benchmarks of a source checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from tilewright.cli.shared import Json


def bench_folder() -> Path:
    """The checkout's `bench/`.

    Raises `FileNotFoundError` when tilewright runs from an installed wheel outside a checkout.
    """
    places = [Path(__file__).resolve().parents[3] / "bench", Path.cwd() / "bench"]
    for place in places:
        if (place / "run.py").is_file() and (place / "cases.toml").is_file():
            return place
    raise FileNotFoundError("benchmarks live in the source checkout; run `tw bench` inside a clone of tilewright")


def bench(
    only: Annotated[list[str] | None, typer.Option("--only", metavar="GLOB", help="Cases to run; repeatable.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="List the cases and stop.")] = False,
    threads: Annotated[list[int] | None, typer.Option("--threads", min=1, help="Thread counts; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few repetitions: does it run?")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Results file (JSON lines).")] = None,
    as_json: Json = False,
) -> None:
    """Measure operators and whole models beside their peers in one run; JSON lines into bench/results."""
    folder = bench_folder()
    arguments = [sys.executable, "-m", "bench.run"]
    for name, values in (("--only", only), ("--threads", threads)):
        for value in values or []:
            arguments += [name, str(value)]
    for flag, chosen in (("--list", list_cases), ("--quick", quick), ("--json", as_json)):
        arguments += [flag] if chosen else []
    if output is not None:
        arguments += ["--output", os.fspath(output.absolute())]
    done = subprocess.run(arguments, cwd=folder.parent, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode if done.returncode > 0 else 128 - done.returncode)
