# SPDX-License-Identifier: Apache-2.0
"""`tw quantize`: a checkpoint in, a smaller checkpoint out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.cli.shared import Json, Model, Threads, model_path, print_json, read_text, use_threads

if TYPE_CHECKING:
    import torch

    from tilewright.models import LanguageModel

Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, for example group_size=64; repeatable."),
]


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs; a value that reads as JSON is taken so, any other is text."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair!r}: write KEY=VALUE, for example --set group_size=64")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def calibration(model: LanguageModel, source: str, batches: int, length: int) -> list[torch.Tensor]:
    """Token batches [1, length] from a corpus of `tilewright.data` (its calibration part) or a UTF-8 text file."""
    from tilewright.data import CORPORA, corpus
    from tilewright.evaluate import token_batches, tokenize

    text = corpus(source, "calibration") if source in CORPORA else read_text(Path(source), "the calibration text")
    return token_batches(tokenize(model.tokenizer, text, max_tokens=batches * length), length=length, count=batches)


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new checkpoint.")],
    method: Annotated[str, typer.Option("--method", help="fireq, crossquant, or rtn (round to nearest).")] = "fireq",
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
    """Quantize a model and save it as a tilewright checkpoint (safetensors and a JSON header)."""
    from tilewright import quantize as quantizers
    from tilewright.models import load, save
    from tilewright.models.checkpoint import require_replaceable

    chosen = quantizers.method(method)
    config = chosen.config.from_dict(parse_settings(settings or []))
    path = model_path(model)
    require_replaceable(output)
    use_threads(threads)
    loaded = load(path)
    before = loaded.nbytes
    made = chosen.quantize_model(loaded, config, calibration(loaded, text, batches, length))
    save(made, output)
    report = {
        "model": str(path),
        "output": str(output),
        "method": method,
        "config": config.to_dict(),
        "bytes_before": before,
        "bytes": made.nbytes,
        "notes": list(made.notes),
    }
    if as_json:
        print_json(report)
        return
    print(f"{output}: {made.nbytes / 1e6:.1f} MB of weights ({before / 1e6:.1f} MB before), method {method}")
    for note in made.notes:
        print(f"note: {note}")
