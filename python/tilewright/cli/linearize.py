# SPDX-License-Identifier: Apache-2.0
"""`tw linearize`: a softmax model in, a linear-time one out."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tilewright.cli.quantize import parse_settings
from tilewright.cli.shared import Json, Model, Threads, model_path, print_json, use_threads

Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method or of its training; repeatable."),
]


def parse_layers(text: str) -> str | list[int]:
    """`all`, or indices and ranges such as `0-9,14,20-29`."""
    if text == "all":
        return text
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"--layers {text!r}: write all, or indices and ranges like 0-9,14")
        found += range(int(first), int(last or first) + 1)
    return found


def split_settings(method: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """The method's config and recipe from settings of either.

    Raises:
        ValueError: a key belongs to neither; near and known names are listed.
    """
    mine = {field.name for field in dataclasses.fields(method.config)}
    training = {field.name for field in dataclasses.fields(method.recipe)}
    for key in given:
        if key not in mine | training:
            near = difflib.get_close_matches(key, mine | training, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(mine | training))}"
            raise ValueError(f"method {method.name!r} has no setting {key!r}; {hint}")
    config = method.config.from_dict({key: value for key, value in given.items() if key in mine})
    recipe = method.recipe.from_dict({key: value for key, value in given.items() if key in training})
    return config, recipe


def linearize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new model.")],
    method: Annotated[str, typer.Option("--method", help="liger, or hedgehog.")] = "liger",
    variant: Annotated[
        str | None, typer.Option("--variant", help="Form of the recurrence; liger: gla, hgrn2, gsa.")
    ] = None,
    window: Annotated[int | None, typer.Option("--window", min=1, help="Positions that softmax still sees.")] = None,
    layers: Annotated[str, typer.Option("--layers", help="Layers to convert: all, or like 0-9,14.")] = "all",
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=2, help="Keep softmax attention in one layer of so many.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Training steps; 0 converts only.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="NAME|FILE", help="Training text: a shipped corpus, documentation, a file; repeatable."
        ),
    ] = None,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a training sequence.")] = 512,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of a step.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of the training's random numbers.")] = 0,
    settings: Setting = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Replace a model's softmax attention by a linear-time form, train it on text, and save the result."""
    from tilewright import linearize as methods
    from tilewright.data.bytes import ByteWindows
    from tilewright.linearize.checkpoint import require_replaceable
    from tilewright.linearize.text import text_tokens
    from tilewright.models import load, to_transformers

    chosen = methods.method(method)
    named = {"variant": variant, "window_size": window, "steps": steps, "lr": lr, "seed": seed}
    config, recipe = split_settings(
        chosen, parse_settings(settings or []) | {key: value for key, value in named.items() if value is not None}
    )
    wanted = parse_layers(layers)
    path = model_path(model)
    require_replaceable(output)
    unfinished = training_folder(output, resume)
    use_threads(threads)
    loaded = load(path)
    base = to_transformers(loaded, dequantize=True)
    converted = methods.convert(base, chosen, config, layers=wanted, keep_every=keep_every)
    tokens = text_tokens(loaded.tokenizer, text or ["speeches", "moby-dick"], "calibration")
    report = chosen.train(
        converted, ByteWindows(tokens, batch, length, seed), recipe, teacher=base, directory=unfinished
    )
    training = {"recipe": recipe.to_dict(), "text": text or ["speeches", "moby-dick"], "length": length, "batch": batch}
    methods.save(
        converted, output, tokenizer=loaded.tokenizer, training=training | {"report": report}, source=loaded.source
    )
    remove_training(unfinished)
    done = methods.linearization(converted)
    assert done is not None
    if as_json:
        print_json(
            {"model": str(path), "output": str(output), "method": method, "config": config.to_dict()}
            | {"layers": list(done.layers), "training": training, "report": report}
        )
        return
    print(f"{output}: {len(done.layers)} of {len(base.model.layers)} layers converted, method {method}")
    for line in stages(report):
        print(line)


def stages(report: dict[str, Any]) -> Iterator[str]:
    """One line for each stage of training that a method reports: itself one, or several by name."""
    found = {"training": report} if "losses" in report else report
    for name, stage in found.items():
        losses = stage["losses"] if isinstance(stage, dict) and "losses" in stage else []
        if losses:
            last = losses[-10:]
            mean = sum(last) / len(last)
            yield f"{name}: {len(losses)} steps, loss {losses[0]:.3f} at first, {mean:.3f} over the last {len(last)}"


def training_folder(output: Path, resume: bool) -> Path:
    """Folder beside the output for what an interrupted training leaves.

    Raises:
        ValueError: one is there and ``resume`` is false, or the reverse.
    """
    folder = output.with_name(f"{output.name}.training")
    if folder.exists() and not resume:
        raise ValueError(f"{folder} is left of an interrupted run; go on with --resume, or remove the folder")
    if resume and not folder.exists():
        raise ValueError(f"--resume: there is no {folder} of an interrupted run")
    return folder


def remove_training(folder: Path) -> None:
    """Remove what the finished training kept."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
