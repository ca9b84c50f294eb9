# SPDX-License-Identifier: Apache-2.0
"""Record what runs of `tw train-ternary` gave: curves, held-out bits a byte, samples, a picture.

    python scripts/ternary_run.py RUN [--float-run RUN] -o docs/results/ternary-run

Writes OUTPUT.json and OUTPUT.png. A run is a folder that `tw train-ternary -o RUN` left.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tilewright.data import corpus
from tilewright.data.bytes import held_out_windows
from tilewright.formats import PackedTernary
from tilewright.models import LanguageModel, load
from tilewright.models.engine import Engine, SamplingConfig
from tilewright.models.language_model import weight_nbytes
from tilewright.train.ternary import MODEL, RUN, bits_per_byte
from tilewright.train.texts import encode, token_lengths

PARTS = ("moby-dick", "speeches")
PROMPTS = ("The whale", "My fellow citizens,", "There was a time when")
NEW_TOKENS, TEMPERATURE, TOP_P = 120, 0.5, 0.95
SMOOTH = 10


def curve(folder: Path) -> dict[str, Any]:
    """Means of the training loss over SMOOTH steps, the evaluations, and the time spent in steps."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [r for r in records if "loss" in r]
    blocks = [steps[i : i + SMOOTH] for i in range(0, len(steps), SMOOTH)]
    return {
        "training": [[b[-1]["step"] + 1, round(sum(r["loss"] for r in b) / len(b), 4)] for b in blocks],
        "evaluations": [[r["step"], round(r["evaluation"]["bits_per_byte"], 4)] for r in records if "evaluation" in r],
        "steps": len(steps),
        "tokens": sum(r["count"] for r in steps),
        "step_seconds": round(sum(r["seconds"] for r in steps)),
    }


def held_out(model: LanguageModel, length: int) -> dict[str, float]:
    """Bits a byte of each evaluation text, computed by the decode engine from the packed checkpoint."""
    engine = Engine(model, length)
    lengths = token_lengths(model.tokenizer)

    class Logits(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.stack([engine.logits(row) for row in ids])

    found = {}
    for name in PARTS:
        tokens = encode(model.tokenizer, "", corpus(name, "evaluation"))
        score = bits_per_byte(held_out_windows(tokens, length=length, batch=1), lengths)
        found[name] = round(score(Logits())["bits_per_byte"], 4)
    return found


def samples(model: LanguageModel) -> list[dict[str, Any]]:
    """Texts that the model writes, each from a prompt and a seed."""
    engine = Engine(model, model.config.max_position_embeddings)
    found = []
    for seed, prompt in enumerate(PROMPTS):
        ids = [int(i) for i in model.tokenizer(prompt)["input_ids"]]
        sampling = SamplingConfig(temperature=TEMPERATURE, top_p=TOP_P, seed=seed)
        text = model.tokenizer.decode(list(engine.generate(ids, sampling, max_new_tokens=NEW_TOKENS)))
        found.append({"prompt": prompt, "seed": seed, "text": text})
    return found


def describe(folder: Path) -> dict[str, Any]:
    """Everything about one run."""
    settings = json.loads((folder / RUN).read_text(encoding="utf-8"))
    settings["text"] = [Path(name).name for name in settings["text"]]
    model = load(folder / MODEL)
    ternary = [w for w in model.weights.values() if isinstance(w, PackedTernary)]
    return {
        "settings": settings,
        "curve": curve(folder),
        "held_out_bits_per_byte": held_out(model, settings["length"]),
        "ternary_weights": sum(w.shape[0] * w.shape[1] for w in ternary),
        "ternary_bytes": sum(w.nbytes for w in ternary),
        "weight_bytes": sum(weight_nbytes(w) for w in model.weights.values()),
        "samples": samples(model),
    }


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Held-out bits a byte over the tokens seen, and the training loss beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for (name, run), colour in zip(runs.items(), ("#c1440e", "#3b6ea8"), strict=False):
        a_step = run["settings"]["batch"] * run["settings"]["length"] / 1e6
        left.plot(
            [s * a_step for s, _ in run["curve"]["training"]], [v for _, v in run["curve"]["training"]], color=colour
        )
        points = run["curve"]["evaluations"]
        label = f"{name}: {points[-1][1]:.2f} bits a byte" if points else name
        right.plot([s * a_step for s, _ in points], [v for _, v in points], ".-", color=colour, label=label)
    left.set(xlabel="million tokens seen", ylabel="nats a token", title="training loss, means of ten steps")
    right.set(xlabel="million tokens seen", ylabel="bits a byte", title="held-out text")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--float-run", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    runs = {"ternary": describe(arguments.run)}
    if arguments.float_run is not None:
        runs["float"] = describe(arguments.float_run)
    arguments.output.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    plot(runs, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
