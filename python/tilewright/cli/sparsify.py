# SPDX-License-Identifier: Apache-2.0
"""`tw sparsify`: a checkpoint in, one that drops neurons below thresholds out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilewright.cli.quantize import calibration, parse_settings
from tilewright.cli.shared import Json, Model, Threads, model_path, print_json, use_threads

Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, for example ranking=norm; repeatable."),
]


def sparsify(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new checkpoint.")],
    method: Annotated[str, typer.Option("--method", help="cats.")] = "cats",
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Share of neurons to drop, at least 0 and below 1.")
    ] = None,
    settings: Setting = None,
    text: Annotated[
        str,
        typer.Option("--calibration", metavar="NAME|FILE", help="speeches, moby-dick, encyclopedia, or a text file."),
    ] = "speeches",
    batches: Annotated[int, typer.Option("--batches", min=1, help="Calibration sequences.")] = 8,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens of each.")] = 512,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Choose thresholds below which neurons of an MLP are skipped, and save the model with them."""
    from tilewright import sparsify as sparsifiers
    from tilewright.models import load, save
    from tilewright.models.checkpoint import require_replaceable

    chosen = sparsifiers.method(method)
    given = {} if sparsity is None else {"sparsity": sparsity}
    config = chosen.config.from_dict(parse_settings(settings or []) | given)
    path = model_path(model)
    require_replaceable(output)
    use_threads(threads)
    loaded = load(path)
    made = chosen.sparsify_model(loaded, config, calibration(loaded, text, batches, length))
    save(made, output)
    if as_json:
        print_json({"model": str(path), "output": str(output), "method": method, "config": config.to_dict()})
        return
    print(f"{output}: method {method}, {', '.join(f'{key} {value}' for key, value in config.to_dict().items())}")
