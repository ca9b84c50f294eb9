# SPDX-License-Identifier: Apache-2.0
"""`tw edge`: the accelerator for ternary models."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tilewright.cli.shared import Json, Model, Verbs, console, model_path, print_json, progress_bar

app = typer.Typer(cls=Verbs, no_args_is_help=True, help="The FPGA accelerator for ternary models.")


def _shape(name: str) -> Any:
    """A preset's shape, or that of a model on disk."""
    from tilewright.edge.tellme.presets import SHAPES, shape_of

    if name.lower() in SHAPES:
        return shape_of(name)
    from pathlib import Path

    from tilewright import models
    from tilewright.edge.tellme.config import Shape

    if not Path(name).expanduser().exists() and name.lower() != "smollm2":
        return shape_of(name)
    c = models.load(model_path(name)).config
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return Shape(
        name, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
        size, c.vocab_size, 2,
    )  # fmt: skip


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="bitnet-0.73b, bitnet-2b, smollm2-135m, or a model on disk.")],
    board: Annotated[str, typer.Option("--board", help="kv260.")] = "kv260",
    clock: Annotated[float, typer.Option("--clock", min=1.0, help="MHz.")] = 250.0,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's build with its fitted efficiency.")] = False,
    search: Annotated[bool, typer.Option("--search", help="The fastest build inside the paper's resources.")] = False,
    json: Json = False,
) -> None:
    """Cycles, external memory, time to the first token, tokens a second and resources."""
    from tilewright._methods import choose
    from tilewright.edge.tellme import OURS, Calibration, TellmeConfig
    from tilewright.edge.tellme.presets import BOARDS
    from tilewright.edge.tellme.search import search as find

    shape, limits = _shape(model), choose(BOARDS, board.lower(), "board")
    if search:
        found = find(shape, f_mhz=clock)
        if not found:
            raise ValueError(f"no build for {shape.name} fits the budget")
        config = found[0].config
    else:
        config = TellmeConfig(
            shape, calibration=Calibration() if paper else OURS, f_mhz=clock, fill=0 if paper else 27, fused=not paper
        )
    report = config.report() | {"board": board, "fits_the_board": config.resources().fits(limits)}
    if json:
        print_json(report)
        return
    from rich.table import Table

    table = Table("quantity", "value", title=f"{shape.name} on {board} at {clock:g} MHz")
    for key, value in report.items():
        for name, one in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(f"{key} {name}".strip(), f"{one:.6g}" if isinstance(one, float) else str(one))
    console().print(table)


@app.command("report")
def report_(
    model: Annotated[str, typer.Argument(help="bitnet-0.73b, bitnet-2b, smollm2-135m, or a model on disk.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write to.")],
    clock: Annotated[float, typer.Option("--clock", min=1.0, help="MHz.")] = 250.0,
    json: Json = False,
) -> None:
    """Phases of a token, how busy each unit of the RTL is, and what it takes of a KV260: tables, pictures, JSON."""
    from pathlib import Path

    from tilewright.edge.tellme.report import report, save

    document = report(_shape(model), clock)
    paths = save(document, Path(output).expanduser())
    if json:
        print_json(document)
        return
    for path in paths.values():
        print(path)


def _edge_model(name: str) -> tuple[Any, Any]:
    """A model for the accelerator and its tokenizer."""
    from tilewright import models
    from tilewright.edge.model import EdgeModel

    loaded = models.load(model_path(name))
    return EdgeModel.from_transformers(models.to_transformers(loaded, dequantize=True)), loaded.tokenizer


@app.command("compile")
def compile_(
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="Image file to write.")],
    json: Json = False,
) -> None:
    """Write weight streams, descriptors, tables and memory map; linears are rounded to ternary if they are not."""
    from tilewright.edge.image import compile_image

    edge, tokenizer = _edge_model(model)
    manifest = compile_image(edge, output)
    if json:
        print_json(manifest)
        return
    del tokenizer
    for name, section in manifest["sections"].items():
        print(f"{name:12} at {section['offset']:#012x}, {section['bytes']} bytes")


@app.command()
def simulate(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image of `tw edge compile`, or a model.")],
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    engine: Annotated[str, typer.Option("--engine", help="python, hls or rtl.")] = "hls",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many to generate.")] = 16,
    tokenizer_of: Annotated[
        str | None, typer.Option("--tokenizer", help="The model whose tokenizer an image is used with.")
    ] = None,
    json: Json = False,
) -> None:
    """Generate text in simulation, bit for bit as the accelerator."""
    from pathlib import Path

    from tilewright import models
    from tilewright.edge.contract.layer import PythonUnits
    from tilewright.edge.hls import HlsUnits
    from tilewright.edge.image import MAGIC, read_image
    from tilewright.edge.rtl import RtlSession

    if engine not in ("python", "hls", "rtl"):
        raise ValueError(f"--engine {engine}: needed python, hls or rtl")
    path = Path(image).expanduser()
    compiled = path.is_file() and path.open("rb").read(8) == MAGIC
    if compiled:
        if tokenizer_of is None:
            raise ValueError(f"{image}: an image has no tokenizer; name its model with --tokenizer")
        edge, tokenizer = read_image(path).model, models.load(model_path(tokenizer_of)).tokenizer
    else:
        edge, tokenizer = _edge_model(image)
    ids = [int(i) for i in tokenizer.encode(prompt)]
    capacity = len(ids) + tokens
    session: Any = (
        RtlSession(edge, capacity)
        if engine == "rtl"
        else edge.session(HlsUnits() if engine == "hls" else PythonUnits(), capacity=capacity)
    )
    with progress_bar() as report:
        found = session.generate(
            ids,
            tokens,
            lambda done: report("tokens", done, tokens),
            lambda done: report("layers", done + 1, len(edge.layers)),
        )
    text = tokenizer.decode(found)
    counted = _counted(session, len(ids) + tokens - 1) if engine == "rtl" else {}
    if json:
        print_json(
            {"engine": engine, "prompt": ids, "tokens": found, "text": text, "status": int(session.status.value)}
            | counted
        )
        return
    print(text)
    for name, value in counted.items():
        print(f"{name.replace('_', ' '):24} {value}")


def _counted(session: Any, tokens: int) -> dict[str, Any]:
    """What the accelerator counted, and the cycle model beside it."""
    cycles = session.counts["cycles"]
    return {
        "cycles": cycles,
        "cycles_of_the_model": session.expected_total,
        "cycles_per_token": round(cycles / tokens),
        **{f"{name}_cycles": session.counts[name] for name in ("load", "enter", "sweep", "attend")},
        **{name: session.counts[name] for name in ("weight_beats", "key_rows", "value_rows")},
    }


VERBS = {"edge": app}
