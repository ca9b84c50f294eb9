# SPDX-License-Identifier: Apache-2.0
"""The claim: a local linear fit at each query, exactly, without the bias of local averages, in linear memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(experiment: Experiment) -> Iterator[Row]:
    """Exactness, gradients, limits, memory; piecewise linear data, real data; trained models."""
    from tilewright.nn.local_linear_attention import _claim_data, _claim_exact, _claim_training

    yield from _claim_exact.rows(experiment)
    yield from _claim_data.piecewise_rows(experiment)
    yield from _claim_data.real_rows(experiment)
    yield from _claim_training.rows(experiment)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Left: error along the piecewise linear sequence, d = 8. Middle: real data. Right: peak memory."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    piecewise = values["piecewise"]["8"]
    for name, curve in piecewise["curves"].items():
        left.plot(curve["token"], curve["mse"], label=name)
    for edge in piecewise["edges"]:
        left.axvline(edge, color="0.8", linewidth=0.8)
    left.set_yscale("log")
    left.set_xlabel("token")
    left.set_ylabel("squared error, mean of 32 tokens")
    left.set_title("segments of linear maps, d = 8", fontsize=9)
    left.legend(fontsize=7)
    names = list(values["real"])
    for i, method in enumerate(("LLA", "kernel average", "running ridge")):
        heights = [values["real"][name][method]["mse"] for name in names]
        middle.bar([x + 0.27 * i for x in range(len(names))], heights, 0.27, label=method)
    middle.set_xticks([x + 0.27 for x in range(len(names))], names)
    middle.set_title("running prediction, MSE", fontsize=9)
    middle.set_ylim(0, 0.75)
    middle.legend(fontsize=7)
    for name, found in values["memory"].items():
        right.plot(found["tokens"], [b / 2**20 for b in found["bytes"]], marker="o", label=name)
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set_xlabel("tokens")
    right.set_title("peak memory, MiB", fontsize=9)
    right.legend(fontsize=7, loc="lower right")


CLAIM = Claim(
    "lla",
    "Local linear attention: the exact fit at each query, below kernel averages and a global fit where the truth moves",
    "Zuo et al., arXiv 2510.01450",
    run,
    plot,
)
