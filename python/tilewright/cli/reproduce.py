# SPDX-License-Identifier: Apache-2.0
"""`tw reproduce`: rerun the central claim of a method."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilewright.cli.codes import ExitCode
from tilewright.cli.shared import Json, console, print_json

if TYPE_CHECKING:
    from tilewright.claims import Report


def reproduce(
    slug: Annotated[str | None, typer.Argument(metavar="[SLUG]", help="A method's name, for example fireq.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the claims and stop.")] = False,
    run_all: Annotated[bool, typer.Option("--all", help="Run every claim.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The short form: the same rows, less data.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of JSON and PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Rerun a claim, print quantity, paper, here, must hold, holds; exit code 1 when a row does not hold."""
    from tilewright import claims

    if sum((slug is not None, list_all, run_all)) != 1:
        raise ValueError("give one SLUG, or --list, or --all")
    if list_all:
        found = claims.discover()
        if as_json:
            print_json([{"slug": c.slug, "title": c.title, "source": c.source} for c in found.values()])
        else:
            for claim in found.values():
                print(f"{claim.slug}  {claim.title} ({claim.source})")
        return
    chosen = list(claims.discover().values()) if run_all else [claims.find(str(slug))]
    folder = output or claims.DEFAULT_DIRECTORY
    say = (lambda line: print(line, file=sys.stderr)) if sys.stderr.isatty() else None
    reports = []
    for claim in chosen:
        reports.append(claims.run_claim(claim, quick=quick, directory=folder, say=say))
        if not as_json:
            show(reports[-1])
    if as_json:
        documents = [report.to_dict() for report in reports]
        print_json(documents if run_all else documents[0])
    if claims.exit_code(reports) != ExitCode.OK:
        raise typer.Exit(ExitCode.FAILED)


def show(report: Report) -> None:
    """The claim's table on standard output."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{report.title} ({report.source})", title_justify="left")
    for heading in ("quantity", "paper", "here", "must hold", "holds"):
        table.add_column(heading, overflow="fold")
    for row in report.rows:
        holds = Text("yes", style="green") if row.holds else Text("NO", style="bold red")
        table.add_row(*map(Text, (row.quantity, row.paper, row.shown(), row.must)), holds)
    out = console()
    out.print(table)
    verdict = "holds" if report.holds else "does not hold"
    out.print(Text(f"{report.slug}: the claim {verdict} ({report.seconds:.0f} s)"))
