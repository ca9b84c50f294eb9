# SPDX-License-Identifier: Apache-2.0
"""`tw train-ternary`: text in, a packed ternary language model out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.cli.shared import Json, Threads, print_json, use_threads

if TYPE_CHECKING:
    from tilewright.train.ternary import TernaryRun

Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="NAME|FILE", help="moby-dick, speeches, encyclopedia, or a file; repeatable."),
]
HeldOut = Annotated[
    list[str] | None,
    typer.Option("--held-out", metavar="NAME|FILE", help="Text to score, never trained on; repeatable."),
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the training, as weight_decay=0.1; repeatable."),
]


def settings_of(config: Path | None, given: dict[str, Any], training: dict[str, Any]) -> TernaryRun:
    """A run from a file's settings (or the defaults), overridden by the options that were given."""
    from tilewright.train import TrainConfig
    from tilewright.train.ternary import TernaryRun

    default = TrainConfig(
        steps=1000, lr=2e-3, schedule="wsd", final_lr=0.0, warmup=100, evaluate_every=100, save_every=100
    )
    run = TernaryRun(default) if config is None else TernaryRun.read(config)
    values = run.training.to_dict() | training
    if "steps" in training and "warmup" not in training:
        values["warmup"] = min(values["warmup"], values["steps"])
    return dataclasses.replace(run, training=TrainConfig.from_dict(values), **given)


def train_ternary(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run; its `model` is the result.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="A JSON file of settings, as the run.json that a run leaves.")
    ] = None,
    text: Texts = None,
    held_out: HeldOut = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="bytes, bpe:N, or a model whose is used. [default: bpe:2048]")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Layers. [default: 4]")] = None,
    width: Annotated[int | None, typer.Option("--width", min=2, help="Hidden size. [default: 256]")] = None,
    inner: Annotated[int | None, typer.Option("--inner", min=1, help="Width of the MLP. [default: 768]")] = None,
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="Query heads. [default: 4]")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", min=1, help="Key heads. [default: 2]")] = None,
    activation: Annotated[
        str | None, typer.Option("--activation", help="silu (SwiGLU) or relu2 (squared ReLU). [default: silu]")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Optimizer steps. [default: 1000]")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Windows a step. [default: 4]")] = None,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Tokens of a window. [default: 512]")] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Longest sequence. [default: 512]")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate. [default: 0.002]")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of weights and data. [default: 0]")] = None,
    settings: Setting = None,
    in_float: Annotated[
        bool, typer.Option("--float", help="Train the float model of the same shape, to compare with.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a BitNet b1.58 language model; the folder `model` works with generate, eval and bench.

    With --resume and no other settings a run goes on with its own; --steps may then lengthen or shorten it.
    """
    from tilewright.cli.quantize import parse_settings
    from tilewright.train.ternary import RUN
    from tilewright.train.ternary import train_ternary as train

    if resume and config is None and (output / RUN).exists():
        config = output / RUN
    model: dict[str, Any] = {"text": tuple(text) if text else None, "held_out": tuple(held_out) if held_out else None}
    model |= {"tokenizer": tokenizer, "layers": layers, "width": width, "inner": inner, "heads": heads}
    model |= {"kv_heads": kv_heads, "hidden_act": activation, "batch": batch, "length": length, "context": context}
    model |= {"ternary": False if in_float else None}
    training = {"steps": steps, "lr": lr, "seed": seed, **parse_settings(settings or [])}
    run = settings_of(config, *({k: v for k, v in some.items() if v is not None} for some in (model, training)))
    use_threads(threads)
    report = train(run, output, resume=resume)
    if as_json:
        print_json(report)
        return
    kind = "ternary" if report["ternary"] else "float"
    print(f"{report['output']}: {kind}, {report['parameters'] / 1e6:.2f} M parameters, {report['steps']} steps")
    print(
        f"held-out loss {report['held_out_loss']:.3f} nats a token, {report['held_out_bits_per_byte']:.3f} bits a byte"
    )


VERBS = {"train-ternary": train_ternary}
