# SPDX-License-Identifier: Apache-2.0
"""The main job: a real language model in four bits, measured beside torch and llama.cpp on the same text.

Every row runs in a process of its own, so that its memory is its own. What is written, and the names in it, are fixed:
`demo.json` ({"machine", "rows": [{"method", "bits_per_weight", "bytes", "perplexity", "prefill_tokens_per_s",
"decode_tokens_per_s", "resident_growth_bytes", ...}], ...}), `demo.md` and `demo.png`.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright._files import atomic_write
from tilewright.data.fetch import Progress, silent
from tilewright.measure.launch import OWN, MeasureError, Method, run, why_absent
from tilewright.measure.protocol import Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tilewright.models import LanguageModel

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Give me three tips for writing a clear letter.",
)
WINDOW = 512
PROMPT_TOKENS = 512
HEADINGS = ("method", "bits/weight", "MB", "perplexity", "prefill, tok/s", "decode, tok/s", "resident growth, MB")
MEASURES = (
    ("perplexity", "perplexity", 1.0, "lower is better"),
    ("decode_tokens_per_s", "decode, tokens/s", 1.0, "higher is better"),
    ("prefill_tokens_per_s", "prefill, tokens/s", 1.0, "higher is better"),
    ("resident_growth_bytes", "resident growth, MB", 1e6, "lower is better"),
)


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    windows: int
    decode: int
    repeats: int
    new_tokens: int
    calibration: tuple[int, int]


FULL = Effort(windows=8, decode=64, repeats=3, new_tokens=48, calibration=(8, 512))
QUICK = Effort(windows=1, decode=8, repeats=1, new_tokens=12, calibration=(2, 256))


def quantized_checkpoints(model: LanguageModel, effort: Effort, folder: Path) -> dict[str, Path]:
    """The model's own 4-bit weights with FireQ's activation and cache formats, with and without key scaling."""
    from tilewright import quantize
    from tilewright.data import corpus
    from tilewright.evaluate import token_batches, tokenize
    from tilewright.models import save

    fireq = quantize.method("fireq")
    count, length = effort.calibration
    text = tokenize(model.tokenizer, corpus("speeches", "calibration"), max_tokens=count * length)
    batches = token_batches(text, length=length, count=count)
    settings: dict[str, dict[str, Any]] = {
        "fireq": {"weights": "keep"},
        "unscaled": {"weights": "keep", "pre_rope": False, "post_rope_top_k": 0},
    }
    paths = {}
    for name, chosen in settings.items():
        made = fireq.quantize_model(model, fireq.config.from_dict(chosen), batches)
        paths[name] = save(made, folder / name, tokenizer=False)
    return paths


def table_methods(gguf: Path, checkpoints: dict[str, Path]) -> dict[str, Method]:
    """What each row of the table runs, in the order of the table."""
    fp8, int8 = {"act": "fp8", "kv_bits": 4}, {"act": "int8", "kv_bits": 4}
    fp8_wide, int8_wide = fp8 | {"kv_bits": 16}, int8 | {"kv_bits": 16}
    scaled, unscaled = str(checkpoints["fireq"]), str(checkpoints["unscaled"])
    return {
        "torch float32": Method("torch", str(gguf), {"dtype": "float32"}),
        "torch bfloat16": Method("torch", str(gguf), {"dtype": "bfloat16"}),
        "tilewright: own 4-bit weights, FP8 activations, INT4 KV": Method("tilewright", scaled, fp8),
        "tilewright: own 4-bit weights, INT8 activations, INT4 KV": Method("tilewright", scaled, int8),
        "tilewright: as the FP8 row, no RoPE-aware scaling": Method("tilewright", unscaled, fp8),
        "tilewright: as the FP8 row, 16-bit KV": Method("tilewright", unscaled, fp8_wide),
        "tilewright: as the INT8 row, 16-bit KV": Method("tilewright", unscaled, int8_wide),
        "llama.cpp, same file, 16-bit KV": Method("llama.cpp", str(gguf)),
    }


def texts(model: LanguageModel, effort: Effort) -> dict[str, list[list[int]]]:
    """Held-out windows of token ids: speeches, and encyclopedia openings where they are installed."""
    from tilewright.data import corpus
    from tilewright.data.text import find_encyclopedia
    from tilewright.evaluate import tokenize

    names = ["speeches"] + (["encyclopedia"] if find_encyclopedia() else [])
    windows = {}
    for name in names:
        ids = tokenize(model.tokenizer, corpus(name, "evaluation"), max_tokens=effort.windows * WINDOW).tolist()
        windows[name] = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    return windows


def questions(model: LanguageModel) -> list[list[int]]:
    """The questions in the model's chat template, as token ids."""
    tokenizer, ids = model.tokenizer, []
    for question in QUESTIONS:
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return ids


def finished_row(name: str, spec: Spec, found: dict[str, Any], decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """A table row in the fixed names, from what the worker measured."""
    prefill, steps = statistics.median(found["prefill_ns"]), statistics.median(found["decode_ns"])
    return {
        "method": name,
        "runner": spec.runner,
        "options": spec.options,
        "bits_per_weight": found["bits_per_weight"],
        "bytes": found["bytes"],
        "perplexity": found["perplexity"]["speeches"],
        "perplexities": found["perplexity"],
        "prefill_tokens_per_s": 1e9 * len(spec.prompt) / prefill,
        "decode_tokens_per_s": 1e9 * spec.decode / steps,
        "resident_growth_bytes": found["resident_growth_bytes"],
        "resident_baseline_bytes": found["resident_baseline_bytes"],
        "anonymous_growth_bytes": found["anonymous_growth_bytes"],
        "peak_growth_bytes": found["peak_growth_bytes"],
        "cache_bytes": found.get("cache_bytes"),
        "load_seconds": found["load_seconds"],
        "prefill_ns": found["prefill_ns"],
        "decode_ns": found["decode_ns"],
        "library": found["library"],
        "instructions": found.get("instructions"),
        "answers": [decode(ids) for ids in found["generated"]],
    }


def measured_rows(
    methods: dict[str, Method], common: dict[str, Any], decode: Callable[[list[int]], str], progress: Progress
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every row that can be measured, and those left out with their reason.

    common: what all specs share. Raises `MeasureError` when a row of torch's or ours fails; a peer is left out.
    """
    done: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for number, (name, method) in enumerate(methods.items()):
        progress("measuring", number, len(methods))
        reason = why_absent(method.runner)
        if reason is None:
            spec = Spec(runner=method.runner, model=method.model, options=method.options, **common)
            try:
                done.append(finished_row(name, spec, run(spec), decode))
                continue
            except MeasureError as error:
                if method.runner in OWN:
                    raise
                reason = str(error)
        skipped.append({"method": name, "reason": reason})
    progress("measuring", len(methods), len(methods))
    return done, skipped


def run_demo(*, threads: int | None = None, quick: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Fetch the model where needed, quantize it, measure every row; the document that `write` saves.

    Raises what fetching, loading and quantizing raise, and `MeasureError` when a row of torch's or ours fails.
    """
    import torch

    from tilewright.data import smollm2_gguf
    from tilewright.doctor import machine
    from tilewright.models import load

    start, effort = time.perf_counter(), QUICK if quick else FULL
    gguf = smollm2_gguf(fetch=True, progress=progress)
    model = load(gguf)
    windows = texts(model, effort)
    common = {
        "threads": threads or torch.get_num_threads(),
        "windows": windows,
        "prompt": windows["speeches"][0][:PROMPT_TOKENS],
        "decode": effort.decode,
        "repeats": effort.repeats,
        "prompts": questions(model),
        "new_tokens": effort.new_tokens,
        "stop_ids": list(model.config.eos_token_ids),
    }

    def decode(ids: list[int]) -> str:
        return str(model.tokenizer.decode(ids))

    with tempfile.TemporaryDirectory(prefix="tilewright-demo-") as folder:
        progress("quantizing with FireQ", 0, None)
        methods = table_methods(gguf, quantized_checkpoints(model, effort, Path(folder)))
        done, skipped = measured_rows(methods, common, decode, progress)
    return {
        "machine": machine(),
        "threads": common["threads"],
        "quick": quick,
        "model": {"name": gguf.name, "parameters": sum(math.prod(weight.shape) for weight in model.weights.values())},
        "text": {name: {"windows": len(some), "tokens_a_window": WINDOW} for name, some in windows.items()},
        "protocol": {"prompt_tokens": PROMPT_TOKENS, "decode_tokens": effort.decode, "repeats": effort.repeats},
        "questions": list(QUESTIONS),
        "rows": done,
        "skipped": skipped,
        "seconds": time.perf_counter() - start,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row as the table shows it."""
    return [
        row["method"],
        f"{row['bits_per_weight']:.2f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['perplexity']:.2f}",
        f"{row['prefill_tokens_per_s']:.0f}",
        f"{row['decode_tokens_per_s']:.1f}",
        f"{row['resident_growth_bytes'] / 1e6:.0f}",
    ]


def markdown(document: dict[str, Any]) -> str:
    """The table, how it was measured, and the answers, as Markdown."""
    machine, protocol = document["machine"], document["protocol"]
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in document["rows"]]
    lines += ["", *(f"Left out: {row['method']}: {row['reason']}." for row in document["skipped"])]
    windows = document["text"]["speeches"]["windows"]
    lines += [
        "",
        f"{document['model']['name']} on {machine['processor']} ({machine['cores']} cores, {document['threads']} "
        f"threads, instructions {machine['isa']}), torch {machine['torch']}. Perplexity over {windows} windows of "
        f"{WINDOW} tokens of held-out speeches; prefill of {protocol['prompt_tokens']} tokens and "
        f"{protocol['decode_tokens']} decoded behind them, median of {protocol['repeats']}; resident growth is the "
        "process after loading and one generation minus before. The file's weights are 4-bit already, so the torch "
        "rows hold them dequantized.",
    ]
    others = [name for name in document["text"] if name != "speeches"]
    for name in others:
        found = ", ".join(f"{row['method']} {row['perplexities'][name]:.2f}" for row in document["rows"])
        lines += ["", f"Perplexity on {name} text: {found}."]
    for number, question in enumerate(document["questions"]):
        lines += ["", f"**{question}**", ""]
        lines += [f"- {row['method']}: {' '.join(row['answers'][number].split())}" for row in document["rows"]]
    return "\n".join(lines) + "\n"


def shade(row: dict[str, Any]) -> str:
    """Colour of a row's bars: ours strong, ours without key scaling pale, others grey."""
    if row["runner"] != "tilewright":
        return "#9aa5b1"
    return "#e2a999" if "no RoPE" in row["method"] else "#c8553d"


def draw(document: dict[str, Any], figure: Figure) -> None:
    """Four panels of bars, one a measure; ours are coloured."""
    rows = document["rows"]
    names = [row["method"].replace(": ", ":\n", 1).replace(", same", ",\nsame") for row in rows]
    colours = [shade(row) for row in rows]
    places = list(range(len(rows)))[::-1]
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axis, (key, title, unit, sense) in zip(panels, MEASURES, strict=True):
        values = [row[key] / unit for row in rows]
        axis.barh(places, values, color=colours, height=0.68)
        axis.set_title(title, fontsize=11, loc="left", fontweight="bold", pad=18)
        axis.text(0, 1.015, sense, transform=axis.transAxes, fontsize=8.5, color="#667380")
        axis.set_xlim(0, max(values) * 1.28)
        for place, value in zip(places, values, strict=True):
            text = f"{value:.2f}" if key == "perplexity" else f"{value:,.0f}"
            axis.text(value + max(values) * 0.02, place, text, va="center", fontsize=9)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="x", bottom=False, labelbottom=False)
        axis.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, names, fontsize=9)
    machine = document["machine"]
    figure.suptitle(
        f"{document['model']['name'].removesuffix('.gguf')} on {machine['processor']}, {document['threads']} threads",
        fontsize=12,
        x=0.01,
        ha="left",
    )


def write(document: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Save `demo.json`, `demo.md` and, where matplotlib is installed, `demo.png` in `folder`; the paths by kind."""
    paths = {"json": folder / "demo.json", "md": folder / "demo.md"}
    with atomic_write(paths["json"]) as path:
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with atomic_write(paths["md"]) as path:
        path.write_text(markdown(document), encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return paths
    figure = Figure(figsize=(14, 0.62 * len(document["rows"]) + 1.6), layout="constrained")
    draw(document, figure)
    paths["png"] = folder / "demo.png"
    with atomic_write(paths["png"]) as path:
        figure.savefig(path, dpi=130, format="png")
    return paths
