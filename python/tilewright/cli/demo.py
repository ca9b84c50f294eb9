# SPDX-License-Identifier: Apache-2.0
"""`tw demo`: the main job on a real model, as a table, JSON, Markdown and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tilewright.cli.shared import Json, Threads, console, print_json, progress_bar


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of demo.json, demo.md, demo.png.")] = Path(
        "reports"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A few tokens of everything, to see that it runs.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Take SmolLM2-135M through it all: fetch, quantize with FireQ, measure beside torch and llama.cpp (minutes)."""
    from tilewright.demo import run_demo, write

    with progress_bar() as progress:
        document = run_demo(threads=threads, quick=quick, progress=progress)
    paths = write(document, output)
    if as_json:
        print_json(document)
    else:
        show(document, paths)


def show(document: dict[str, Any], paths: dict[str, Path]) -> None:
    """The table, what was left out, and our model's answers."""
    from rich.table import Table
    from rich.text import Text

    from tilewright.demo import HEADINGS, cells

    table = Table(title=f"{document['model']['name']}, {document['threads']} threads", title_justify="left")
    table.add_column(HEADINGS[0], overflow="fold")
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for row in document["rows"]:
        table.add_row(*cells(row), style="bold" if row["runner"] == "tilewright" else None)
    out = console()
    out.print(table)
    for row in document["skipped"]:
        out.print(Text(f"left out: {row['method']}: {row['reason']}"))
    ours = next(row for row in document["rows"] if row["runner"] == "tilewright")
    for question, answer in zip(document["questions"], ours["answers"], strict=True):
        out.print(Text(f"\n{question}", style="bold"))
        out.print(Text(answer.strip()))
    out.print(Text(f"\n{document['seconds']:.0f} s; saved {', '.join(str(path) for path in paths.values())}"))
