# SPDX-License-Identifier: Apache-2.0
"""`tw study`: which linear mixer, and how much full attention."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tilewright.cli.shared import Json, print_json


def study(
    task: Annotated[str, typer.Option(help="mqar, kv (recall) or lm (bytes of text).")] = "mqar",
    mixers: Annotated[str, typer.Option(help="Linear mixers, comma-separated, or all six.")] = "all",
    ratios: Annotated[str, typer.Option(help="pure, r:1 and full, comma-separated, or all.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each cell at its best rate.")] = 3,
    rates: Annotated[str, typer.Option(help="Learning rates to try.")] = "1e-3,3e-3,1e-2",
    tune: Annotated[str, typer.Option(help="Choose a rate for each cell, or for each mixer.")] = "cell",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each training.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the stack.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 64,
    heads: Annotated[int, typer.Option(min=1, help="Heads of each mixer.")] = 4,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of the recall tasks.")] = 16,
    vocabulary: Annotated[int, typer.Option(min=4, help="Tokens of the recall tasks.")] = 64,
    placement: Annotated[str, typer.Option(help="Full layers last, middle or first in their groups.")] = "last",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core when not given.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write, and to go on from.")] = Path(
        "reports/hybrid-study.json"
    ),
    as_json: Json = False,
) -> None:
    """Train small hybrid stacks, mixers x ratios x seeds, and print scores, rankings and costs. It can be resumed."""
    from tilewright.nn.hybrid_linear_attention import study as runner

    if placement not in ("last", "middle", "first"):
        raise ValueError(f"--placement {placement}: choose last, middle or first")
    options: dict[str, Any] = {"task": task, "placement": placement}
    setting = runner.Setting(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        steps=steps,
        batch=batch,
        length=length,
        pairs=pairs,
        vocabulary=vocabulary,
        **options,
    )
    grid: dict[str, Any] = {"tune": tune}
    chosen = runner.Study(
        setting,
        runner.names(mixers, runner.MIXERS),
        runner.names(ratios, runner.RATIOS),
        tuple(float(rate) for rate in rates.split(",")),
        seeds,
        **grid,
    )
    processes = workers or len(os.sched_getaffinity(0))
    if as_json:
        print_json(runner.run_study(chosen, out=output, workers=processes).to_dict())
    else:
        runner.report(chosen, output, processes)
