# SPDX-License-Identifier: Apache-2.0
"""`tw verify`: prove a VNN-LIB property of an ONNX model, or find a counterexample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilewright.cli.shared import Json, Threads, print_json, use_threads


def verify(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The network.")],
    specification: Annotated[Path, typer.Argument(metavar="PROPERTY.vnnlib", help="What is unsafe.")],
    timeout: Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds.")] = 60.0,
    branching: Annotated[str, typer.Option("--branching", help="bbps, babsr or width.")] = "bbps",
    point: Annotated[str, typer.Option("--point", help="Branching points: opt (from a table) or uniform.")] = "opt",
    split: Annotated[str, typer.Option("--split", help="neuron, or input for networks of few inputs.")] = "neuron",
    tried: Annotated[int, typer.Option("--tried", min=1, help="Decisions bounded before one is taken.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Subdomains cut in one round.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Of the attack.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the answer to this file too.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Print sat with a counterexample, unsat (the property holds), unknown or timeout, as in VNN-COMP."""
    from tilewright._files import atomic_write
    from tilewright.verify.genbab.files import verify_files
    from tilewright.verify.genbab.vnnlib import witness_text

    use_threads(threads)
    answer = verify_files(
        model,
        specification,
        timeout=timeout,
        branching=branching,
        branching_point=point,
        tried=tried,
        split=split,
        batch_size=batch,
        seed=seed,
    )
    text = answer.word
    if answer.x is not None and answer.y is not None:
        text += "\n" + witness_text(answer.x, answer.y)
    if output is not None:
        with atomic_write(output) as path:
            path.write_text(text + "\n", encoding="utf-8")
    if not as_json:
        print(text)
        return
    print_json(
        {
            "result": answer.word,
            "x": None if answer.x is None else answer.x.tolist(),
            "y": None if answer.y is None else answer.y.tolist(),
            "lower_bound": answer.lower_bound if abs(answer.lower_bound) < float("inf") else None,
            "domains": answer.domains_visited,
            "seconds": round(answer.time, 3),
            "reason": answer.reason,
        }
    )


VERBS = {"verify": verify}
