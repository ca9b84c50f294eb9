# SPDX-License-Identifier: Apache-2.0
"""`tw train`: text in, a hybrid linear-attention language model out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.cli.quantize import parse_settings
from tilewright.cli.shared import Json, Threads, print_json, use_threads

if TYPE_CHECKING:
    from tilewright.train.language import LanguageRun

Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text", metavar="NAME|FILE", help="speeches, moby-dick, encyclopedia, documentation, or a file; repeatable."
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the training, as weight_decay=0.1; repeatable."),
]


def settings_of(config: Path | None, given: dict[str, Any], training: dict[str, Any]) -> LanguageRun:
    """A run from a file's settings (or the defaults), overridden by the options that were given."""
    from tilewright.train import TrainConfig
    from tilewright.train.language import LanguageRun, read_run

    run = LanguageRun(TrainConfig(steps=1000)) if config is None else read_run(config)
    values = run.training.to_dict() | training
    if "steps" in training and "warmup" not in training:
        values["warmup"] = min(values["warmup"], values["steps"])
    return dataclasses.replace(run, training=TrainConfig.from_dict(values), **given)


def train(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the model, its checkpoint and its log.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="A JSON file of settings, as the run.json that a run leaves.")
    ] = None,
    text: Text = None,
    mixer: Annotated[str | None, typer.Option("--mixer", help="Linear mixer. [default: gated_deltanet]")] = None,
    ratio: Annotated[
        str | None, typer.Option("--ratio", help="Linear to softmax layers: r:1, pure or full. [default: 3:1]")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Layers. [default: 4]")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="Hidden size. [default: 128]")] = None,
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="Heads of each mixer. [default: 4]")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="bytes, or a model whose tokenizer is used. [default: bytes]")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Optimizer steps. [default: 1000]")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Windows a step. [default: 16]")] = None,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Tokens of a window. [default: 256]")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate. [default: 0.001]")] = None,
    warmup: Annotated[int | None, typer.Option("--warmup", min=0, help="Steps until the peak. [default: 0]")] = None,
    evaluate_every: Annotated[
        int | None, typer.Option("--evaluate-every", min=1, help="Steps between looks at the held-out text.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", min=1, help="Steps between checkpoints; one follows the last step.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 autocast.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Of weights and data. [default: 0]")] = None,
    settings: Setting = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")] = False,
    sequence_parallel: Annotated[
        int, typer.Option("--sequence-parallel", min=1, help="Processes that share each window (under torchrun).")
    ] = 1,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a hybrid language model; the folder then works with `tw eval` and `tw generate`.

    With --resume and no other settings a run goes on with its own. Under torchrun parameters are sharded (FSDP2).
    """
    from tilewright.train import Parallel
    from tilewright.train.language import RUN, train_language

    if resume and config is None and (output / RUN).exists():
        config = output / RUN
    model = {"text": tuple(text) if text else None, "mixer": mixer, "ratio": ratio, "layers": layers, "width": width}
    model |= {"heads": heads, "tokenizer": tokenizer, "batch": batch, "length": length}
    training = {"steps": steps, "lr": lr, "warmup": warmup, "evaluate_every": evaluate_every, "save_every": save_every}
    training |= {"seed": seed, "bf16": bf16 or None, **parse_settings(settings or [])}
    run = settings_of(config, *({k: v for k, v in some.items() if v is not None} for some in (model, training)))
    use_threads(threads)
    parallel = Parallel.start(sequence=sequence_parallel)
    report = train_language(run, output, resume=resume, parallel=parallel)
    if parallel.rank != 0:
        return
    if as_json:
        print_json(report)
        return
    ended = f"{report['steps']} steps{' (stopped early)' if report['stopped_early'] else ''}"
    bits = f", {report['bits_per_byte']:.3f} bits a byte" if report["bits_per_byte"] is not None else ""
    print(f"{output}: {report['parameters'] / 1e6:.2f} M parameters, {ended}, loss {report['last_loss']:.3f}")
    print(f"held-out loss {report['held_out_loss']:.3f} nats a token{bits}")
