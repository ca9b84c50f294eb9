# SPDX-License-Identifier: Apache-2.0
"""`tw edge report`: where a token's time goes, how busy each unit is, what the RTL takes of the chip.

Times and shares come from :mod:`.cycles`, the RTL's schedule, and from the memory and host that :class:`Calibration`
assumes; resources from `synthesis.json`. The report says so beside each table.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright._files import atomic_write
from tilewright.edge.contract import Factor, Layer, Linear, Tiling, TlmmWeights
from tilewright.edge.tellme import synthesis
from tilewright.edge.tellme.config import OURS, PAPER_BUDGET, XCK26, Shape, TellmeConfig
from tilewright.edge.tellme.cycles import Pipelines, entry_cycles, layer_cycles, sweep_cycles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096)
PROMPTS = (16, 64, 128, 256, 512)
CHUNK = 16
"""Tokens that the accelerator holds at its default parameters (RowsMax): a longer prompt loads the weights for each."""
KINDS = ("lut", "ff", "dsp", "bram", "uram")
FF_XCK26, FF_PAPER = 234240, 136721
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#bbbbbb", "#66ccee", "#aa3377")


def rtl_config(shape: Shape, f_mhz: float = 250.0) -> TellmeConfig:
    """The default build of the RTL, with the memory and host that the paper's figures were fitted with."""
    return TellmeConfig(shape, Tiling(lanes=8), OURS, f_mhz)


def layer_of(config: TellmeConfig) -> Layer:
    """A layer of the shape's sizes, for counting: its weights are one index, seen everywhere."""
    tiling, shape = config.tiling, config.shape

    def linear(name: str, norm: bool) -> Linear:
        inputs, outputs = shape.linears[name]
        seen = np.broadcast_to(np.uint8(0), (tiling.blocks(inputs), tiling.padded_outputs(outputs), tiling.t))
        gain = np.broadcast_to(np.float16(1), inputs) if norm else None
        return Linear(TlmmWeights(seen, outputs, inputs, tiling), Factor.of(1.0), gain)

    inner = shape.norms == 4
    return Layer(
        linear("q", True), linear("k", False), linear("v", False), linear("o", inner), linear("gate", True),
        linear("up", False), linear("down", inner), shape.heads, shape.kv_heads, shape.head_size, 1e-5,
    )  # fmt: skip


def phases(config: TellmeConfig, first: int, tokens: int) -> dict[str, float]:
    """Seconds of one chunk of ``tokens`` behind ``first`` positions, by what runs: the RTL's schedule
    (:mod:`.cycles`), but weights and cache no faster than the assumed bandwidths. The host's part is one head."""
    shape, hz = config.shape, config.f_mhz * 1e6
    cycles = layer_cycles(layer_of(config), config.tiling, first, tokens, banks=_sets(config))
    seconds = {part: count * shape.layers / hz for part, count in cycles.items()}
    keys = sum(range(first + tokens, first, -config.tiling.p))
    cache = config.kv_bytes(keys) / (config.calibration.bw_kv * min(config.f_mhz / 250, 1))
    return {
        "weights": max(seconds["load"], config.load_seconds()),
        "rows and look-up": seconds["rows"],
        "attention": max(seconds["attend"], cache),
        "descriptors": seconds["descriptors"],
        "head (host)": config.head_seconds(),
    }


def _sets(config: TellmeConfig) -> int:
    """Of tables: with a second one nothing between blocks waits for tables to be filled."""
    return 1 if config.fill else 2


def decode_seconds(config: TellmeConfig, context: int) -> dict[str, float]:
    """Of the token that sees ``context`` keys, its own among them."""
    return phases(config, context - 1, 1)


def prompt_seconds(config: TellmeConfig, tokens: int) -> dict[str, float]:
    """To the first token of a prompt: chunks one after the other, and one head."""
    chunks = [phases(config, at, min(CHUNK, tokens - at)) for at in range(0, tokens, CHUNK)]
    return {part: sum(one[part] for one in chunks) for part in chunks[0]} | {"head (host)": config.head_seconds()}


def utilisation(config: TellmeConfig, context: int) -> dict[str, float]:
    """Share of a decoded token's time in which each unit works. Parts that one row waits for one after the other; the
    dequantizer works beside the look-up."""
    parts = decode_seconds(config, context)
    whole = sum(parts.values())
    tiling, shape, pipelines = config.tiling, config.shape, Pipelines()
    layer = layer_of(config)
    entries = sum(entry_cycles(one, tiling, pipelines)[0] for one in (layer.q, layer.o, layer.gate, layer.down))
    linears = shape.linears.values()
    sweeping = sum(tiling.blocks(n) * -(-k // tiling.q) for n, k in linears)
    matrices = (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
    looked_up = sum(sweep_cycles(one, tiling, _sets(config)).looked_up for one in matrices)
    cycles = {
        "norm and quantizer": entries,
        "look-up, filling tables and waiting for sums to leave": looked_up - sweeping,
        "look-up, sweeping": sweeping,
        "dequantizer and fuse": sum(-(-k // tiling.lanes) for _, k in linears),
    }
    return {
        "weight ports": parts["weights"] / whole,
        **{unit: count * shape.layers / (config.f_mhz * 1e6) / whole for unit, count in cycles.items()},
        "attention and cache ports": parts["attention"] / whole,
        "descriptors": parts["descriptors"] / whole,
        "host": parts["head (host)"] / whole,
    }


def roofline(config: TellmeConfig) -> dict[str, Any]:
    """Ternary products a second against products for a byte of weights, which one to a chunk of tokens share."""
    points = {}
    for tokens in (1, 2, 4, 8, CHUNK):
        parts = phases(config, 0, tokens)
        points[tokens] = {
            "products_per_byte": tokens * config.shape.weights / config.weight_bytes(),
            "products_per_second": tokens * config.shape.weights / (parts["weights"] + parts["rows and look-up"]),
        }
    peak = config.tiling.t * config.tiling.g * config.tiling.q * config.f_mhz * 1e6
    return {"peak": peak, "bytes_per_second": config.weight_bytes() / config.load_seconds(), "tokens": points}


def resources() -> dict[str, Any]:
    """Of each unit that the accelerator holds, their sum, the chip, the paper's accelerator."""
    limits = {**asdict(XCK26), "ff": FF_XCK26}
    found, ff = synthesis.total()
    whole = {**asdict(found), "ff": ff}
    paper = {**asdict(PAPER_BUDGET), "ff": FF_PAPER}
    return {
        "units": {one.name: {**{k: getattr(one, k) for k in KINDS}, "count": one.count}
                  for one in synthesis.units() if one.count},
        "sum": whole,
        "xck26": limits,
        "paper": paper,
        "exceeds_the_xck26_in": [kind for kind in KINDS if whole[kind] > limits[kind]],
        "exceeds_the_paper_in": [kind for kind in KINDS if whole[kind] > paper[kind]],
        "counted_by": synthesis.command(),
    }  # fmt: skip


def report(shape: Shape, f_mhz: float = 250.0) -> dict[str, Any]:
    """Everything, as JSON types."""
    config = rtl_config(shape, f_mhz)
    kept = (
        "model", "tiling", "clock_mhz", "options", "calibrated", "weight_megabytes", "kv_bytes_per_context_token",
    )  # fmt: skip
    model = config.report()
    return {
        **{key: model[key] for key in kept},
        "decode_seconds": {n: decode_seconds(config, n) for n in CONTEXTS},
        "prompt_seconds": {n: prompt_seconds(config, n) for n in PROMPTS},
        "utilisation": {n: utilisation(config, n) for n in (64, 1024)},
        "roofline": roofline(config),
        "synthesis": resources(),
    }


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows]]
    return "\n".join(lines) + "\n"


def markdown(document: dict[str, Any]) -> str:
    """The tables, each with where its numbers come from."""
    parts = list(document["decode_seconds"][CONTEXTS[0]])
    decode = [[str(n), *(f"{1e3 * one[part]:.2f}" for part in parts), f"{1 / sum(one.values()):.1f}"]
              for n, one in document["decode_seconds"].items()]  # fmt: skip
    prompt_parts = list(document["prompt_seconds"][PROMPTS[0]])
    prompts = [[str(n), *(f"{1e3 * one[part]:.1f}" for part in prompt_parts), f"{sum(one.values()):.3f}"]
               for n, one in document["prompt_seconds"].items()]  # fmt: skip
    busy = document["utilisation"]
    shares = [[unit, *(f"{100 * busy[n][unit]:.1f}" for n in busy)] for unit in busy[64]]
    found = document["synthesis"]
    counted = [[name, str(one["count"]), *(f"{one['count'] * one[kind]:.6g}" for kind in KINDS)]
               for name, one in found["units"].items()]  # fmt: skip
    for name, key in (("sum", "sum"), ("the paper's accelerator", "paper"), ("XCK26", "xck26")):
        counted.append([name, "", *(f"{found[key][kind]:.6g}" for kind in KINDS)])
    counted.append(["share of the XCK26, %", "", *(f"{100 * found['sum'][k] / found['xck26'][k]:.0f}" for k in KINDS)])
    over = [
        f"{' and '.join(found[key]).upper() or 'nothing'} beyond {name}"
        for name, key in (("the chip", "exceeds_the_xck26_in"), ("the paper's", "exceeds_the_paper_in"))
    ]
    # eta and key_cycles are at their neutral values here: the schedules' own cycles.
    calibrated = ", ".join(
        f"{key} = {value:g}" for key, value in document["calibrated"].items() if key not in ("eta", "key_cycles")
    )
    return "\n".join((
        f"# {document['model']} on the RTL at {document['clock_mhz']:g} MHz\n",
        "Cycles are those of the RTL's schedule (`tilewright.edge.tellme.cycles`), which the simulated accelerator's"
        " counters meet; weights and cache come no faster than assumed, and nothing was measured on a board. Assumed or"
        f" fitted to the paper's figures, not counted: {calibrated}.\n",
        "## A decoded token, ms\n",
        _table(["context", *parts, "tokens/s"], decode),
        "![Phases of a token](phases.png)\n",
        "## A prompt, ms by part and seconds to the first token\n",
        f"{CHUNK} tokens at a time, each with its own load of the weights.\n",
        _table(["tokens", *prompt_parts, "s"], prompts),
        "## How busy each unit is in decoding, % of the token's time\n",
        "Cycles of each unit over the token's time.\n",
        _table(["unit", *(f"context {n}" for n in busy)], shares),
        "![Roofline](roofline.png)\n",
        "## Resources\n",
        f"Counted by `{found['counted_by']}`, unit by unit at the default parameters, times how many there are."
        f" A vendor's tools count within some 20 %; timing is not seen. In sum {', '.join(over)}.\n",
        _table(["unit", "count", "LUT", "FF", "DSP", "BRAM36", "URAM"], counted),
        "![Resources](resources.png)\n",
    ))  # fmt: skip


def plot_phases(document: dict[str, Any], figure: Figure) -> None:
    """Milliseconds of a decoded token by part, over the context."""
    axes = figure.subplots()
    bottom = [0.0] * len(CONTEXTS)
    for part, colour in zip(document["decode_seconds"][CONTEXTS[0]], COLOURS, strict=False):
        sizes = [1e3 * document["decode_seconds"][n][part] for n in CONTEXTS]
        axes.bar(range(len(CONTEXTS)), sizes, bottom=bottom, color=colour, label=part)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    axes.set_xticks(range(len(CONTEXTS)), [str(n) for n in CONTEXTS])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms for a decoded token")
    axes.set_title(f"{document['model']} on the RTL at {document['clock_mhz']:g} MHz")
    axes.legend(fontsize="small")


def plot_roofline(document: dict[str, Any], figure: Figure) -> None:
    """What is reached against what memory and the tables allow."""
    axes, line = figure.subplots(), document["roofline"]
    intensities = [point["products_per_byte"] for point in line["tokens"].values()]
    ends = [min(intensities) / 2, line["peak"] / line["bytes_per_second"], max(intensities) * 2]
    roof = [min(line["peak"], x * line["bytes_per_second"]) / 1e9 for x in ends]
    axes.loglog(ends, roof, color="black", label="weight ports, then T G Q products a cycle")
    axes.loglog(intensities, [point["products_per_second"] / 1e9 for point in line["tokens"].values()], "o",
                color=COLOURS[0], label="loading, then sweeping, in turns")  # fmt: skip
    for tokens, point in line["tokens"].items():
        place = (point["products_per_byte"], point["products_per_second"] / 1e9)
        axes.annotate(str(tokens), place, textcoords="offset points", xytext=(4, -12))
    axes.set_xlabel("ternary products for a byte of weights")
    axes.set_ylabel("10^9 products a second")
    axes.set_title("Linears of 1 (decoding) to 16 tokens (a chunk of a prompt) a load")
    axes.legend(fontsize="small", loc="lower right")


def plot_resources(document: dict[str, Any], figure: Figure) -> None:
    """Units stacked, as shares of the chip."""
    axes, found = figure.subplots(), document["synthesis"]
    bottom = [0.0] * len(KINDS)
    largest = sorted(found["units"].items(), key=lambda item: -item[1]["lut"] * item[1]["count"])
    for place, (name, one) in enumerate(largest):
        sizes = [100 * one["count"] * one[kind] / found["xck26"][kind] for kind in KINDS]
        label = name if place < len(COLOURS) - 1 else "the rest" if place == len(COLOURS) - 1 else None
        axes.bar(range(len(KINDS)), sizes, bottom=bottom, color=COLOURS[min(place, len(COLOURS) - 1)], label=label)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    axes.axhline(100, color="black", linewidth=1)
    axes.set_xticks(range(len(KINDS)), ["LUT", "FF", "DSP", "BRAM", "URAM"])
    axes.set_ylabel("% of the XCK26")
    axes.set_title("The RTL's units, counted by Yosys")
    axes.legend(fontsize="small")


def save(document: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write `report.json`, `report.md` and, where matplotlib is installed, the pictures; the paths by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"json": folder / "report.json", "md": folder / "report.md"}
    with atomic_write(paths["json"]) as path:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = markdown(document)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("!["))
    else:
        for name, plot in (("phases", plot_phases), ("roofline", plot_roofline), ("resources", plot_resources)):
            figure = Figure(figsize=(8, 5), layout="tight")
            plot(document, figure)
            paths[name] = folder / f"{name}.png"
            with atomic_write(paths[name]) as path:
                figure.savefig(path, dpi=120, format="png")
    with atomic_write(paths["md"]) as path:
        path.write_text(text, encoding="utf-8")
    return paths
