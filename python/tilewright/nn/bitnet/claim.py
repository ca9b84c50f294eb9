# SPDX-License-Identifier: Apache-2.0
"""What BitNet b1.58 promises: ternary weights learn nearly as well as float ones, and run in exact integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(experiment: Experiment) -> Iterator[Row]:
    """Learning beside float and beside rounding afterwards; SmolLM2's shapes on the engine."""
    from tilewright.nn.bitnet import _claim_model, _claim_training

    yield from _claim_training.rows(experiment)
    yield from _claim_model.rows(experiment)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Left: held-out bits a byte of each way to get weights. Right: decoding speed of SmolLM2's shapes."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    training = values["training"]
    names = list(training)
    means = [sum(training[name]) / len(training[name]) for name in names]
    left.barh(names[::-1], means[::-1], color=["#8a8a8a", "#c1440e", "#3b6ea8"][: len(names)])
    for place, name in enumerate(names[::-1]):
        left.plot(training[name], [place] * len(training[name]), "k|", markersize=14)
        left.text(means[names.index(name)], place, f" {means[names.index(name)]:.2f}", va="center")
    left.set(xlabel="held-out bits a byte (ticks: seeds)", xlim=(0, 1.15 * max(means)))
    left.set_title("a small model on Moby Dick and speeches", fontsize=10)
    speeds = values["speed"]
    right.bar(list(speeds), list(speeds.values()), color=["#c1440e", "#8a8a8a"])
    right.set_ylabel("tokens a second, one thread")
    right.set_title("decoding SmolLM2-135M's shapes", fontsize=10)


CLAIM = Claim(
    "bitnet",
    "Ternary weights: trained from the start they predict nearly as well as float ones, and run in exact integers",
    "BitNet b1.58, arXiv 2402.17764",
    run,
    plot,
)
