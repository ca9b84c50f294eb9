# SPDX-License-Identifier: Apache-2.0
"""A study's outcome as a table, rankings and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from tilewright._files import atomic_write
from tilewright.nn.hybrid_linear_attention._study_cells import FULL, SOFTMAX

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tilewright.nn.hybrid_linear_attention.study import Outcome


def table(outcome: Outcome) -> str:
    """Markdown: a row for each mixer, a column for each ratio, mean and standard deviation over seeds."""
    study = outcome.study
    linear = [r for r in study.ratios if r != FULL]
    what = "accuracy" if study.setting.higher_is_better else "loss, nats per byte"
    lines = ["| " + " | ".join([f"{study.setting.task}: {what}", *linear]) + " |", "|---" + "|---:" * len(linear) + "|"]
    rows = [(mixer, [_cell_text(outcome.scores(mixer, ratio)) for ratio in linear]) for mixer in study.mixers if linear]
    lines += ["| " + " | ".join([mixer, *cells]) + " |" for mixer, cells in rows]
    text = "\n".join(lines if linear else []) + "\n"
    if FULL in study.ratios:
        text += f"\nSoftmax in all layers: {_cell_text(outcome.scores(SOFTMAX, FULL))}.\n"
    return text + "".join(f"\n{line}\n" for line in rank_lines(outcome))


def rank_lines(outcome: Outcome) -> Iterator[str]:
    """Rankings of the mixers by ratio, and how the pure one agrees with each."""
    linear = [r for r in outcome.study.ratios if r != FULL]
    if len(outcome.study.mixers) < 2:
        return
    for ratio in linear:
        tau = f"; Kendall's tau with {linear[0]} {outcome.tau(linear[0], ratio):.2f}" if ratio != linear[0] else ""
        yield f"{ratio}: {' > '.join(outcome.ranking(ratio))}{tau}"


def _cell_text(scores: Sequence[float]) -> str:
    spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{mean(scores):.3f}{spread}"


def plot(outcome: Outcome, figure: Figure) -> None:
    """Left: score by ratio. Right: score over the arithmetic of a token, all groups."""
    study = outcome.study
    linear = [r for r in study.ratios if r != FULL]
    left, right = figure.subplots(1, 2)
    for mixer in study.mixers:
        means = [outcome.mean(mixer, ratio) for ratio in linear]
        left.plot(linear, means, marker="o", label=mixer)
        costs = [outcome.chosen(mixer, ratio)[0]["flops_per_token"] for ratio in linear]
        right.scatter(costs, means, label=mixer)
    if FULL in study.ratios:
        level = outcome.mean(SOFTMAX, FULL)
        left.axhline(level, color="black", linestyle="--", label="softmax")
        right.scatter([outcome.chosen(SOFTMAX, FULL)[0]["flops_per_token"]], [level], color="black", marker="*")
    what = "accuracy" if study.setting.higher_is_better else "loss, nats per byte"
    left.set_xlabel("linear : full")
    left.set_ylabel(f"{study.setting.task}: {what}")
    left.legend(fontsize=8)
    right.set_xscale("log")
    right.set_xlabel("mixers' multiplies and adds per token")


def save_plot(outcome: Outcome, path: Path) -> bool:
    """Write the plot as PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    plot(outcome, figure)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return True
